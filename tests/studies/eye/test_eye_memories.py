"""What is measured of a method on the eye: whether its memory is read, and whether the language stays."""

import json

import pytest
import torch
from typer.testing import CliRunner

from studies.eye import lengths, narrations
from studies.eye.command import app
from studies.eye.comparing import command as commands
from studies.eye.comparing import kept, memories, methods
from studies.eye.comparing.measure import measure
from studies.eye.making.align import answers
from studies.eye.options import Opened
from tests.studies.eye.test_eye_methods import EXACT, TOLD, eye
from tests.studies.eye.tiny_eye import drawings, language, tokenizer


@pytest.fixture(autouse=True)
def _short_text(monkeypatch, tmp_path):
    """This tokenizer's tokens are letters; 700 of them are two windows."""
    text = tmp_path / "text.txt"
    text.write_text(kept.TEXT.read_text(encoding="utf-8")[:700], encoding="utf-8")
    monkeypatch.setattr(kept, "TEXT", text)


def with_pvm(read):
    """A PVM that is read or (as it begins) silent."""
    trained = methods.equipped(eye(), methods.Trial("pvm", 16, 0))
    torch.manual_seed(2)
    for value in trained.parameters():
        if value.requires_grad and read:
            value.data.add_(torch.randn_like(value) * 0.5)
    return trained.eval()


def rows_of(trained, images=6):
    told = [one * 2 for one in TOLD]
    return memories.measure(
        methods.bare(trained), trained.disable_adapter, tokenizer(), drawings(), EXACT, told, images, 256
    )


def test_a_silent_memory_changes_no_answer():
    rows = rows_of(with_pvm(read=False))
    said = {(row["images"], row["length"], row["memory"]): row["said"] for row in rows}
    assert {memory for *_, memory in said} == set(memories.MEMORIES)
    assert {length for _, length, _ in said} == {0, 256}
    assert all(texts == said[images, length, "off"] for (images, length, _), texts in said.items())


def test_what_a_memory_holds_changes_answers():
    rows = rows_of(with_pvm(read=True))
    said = {row["memory"]: row["said"] for row in rows if row["length"] == 0 and row["images"] == "unseen grids"}
    assert said["own"] != said["off"]
    assert said["own"] != said["noise"]
    assert {len(row["right"]) for row in rows} == {len(row["said"]) for row in rows} == {6}


def test_off_is_what_the_eye_reads_alone():
    plain = lengths.measure(eye(), tokenizer(), drawings(), EXACT, [one * 20 for one in TOLD], 6, ("base",))
    right = {(row["images"], row["length"]): row["right"] for row in plain}
    for row in rows_of(with_pvm(read=True)):
        if row["memory"] == "off" and row["length"] == 0:
            assert row["right"] == right[row["images"], 0]


def test_greedy_decoding_along_candidates_is_what_the_model_writes():
    model, text = methods.bare(with_pvm(read=True)), tokenizer()
    one = lengths.shown(drawings(), EXACT, 2)["unseen grids"][0]
    written = []
    for _ in range(4):  # letter by letter, each behind those before it
        part = lengths.asked(one.question, "base", [], one.side * EXACT.tokens, text, model.config)
        asked = part.ids[: part.answer] + written + [0]
        _, logits, _ = answers(model, text, one.image, [[type(part)(asked, len(asked) - 1)]], one.side, EXACT)
        written.append(int(logits.argmax(-1)))
    part = type(part)(part.ids[: part.answer] + written, part.answer)
    _, logits, targets = answers(model, text, one.image, [[part]], one.side, EXACT)
    assert memories.greedy([(targets.tolist(), logits.argmax(-1).tolist())]) == written
    wrong = [*written[:2], written[2] + 1, 5]
    likeliest = [*written[:3], 7]
    assert memories.greedy([([9, 9], [written[0], 7]), (wrong, likeliest)]) == written[:3]


def test_too_few_images_hold_no_other():
    with pytest.raises(ValueError, match="ask for more"):
        memories._other(lengths.shown(drawings(), EXACT, 1)["unseen grids"], 0)


def test_the_language_of_a_new_method_is_the_eyes_and_alone_the_original_s():
    text = tokenizer()
    alone = [
        kept.measure(model, text, "", None, EXACT)
        for model in (language(), eye(), methods.bare(with_pvm(read=False)), methods.bare(with_pvm(read=True)))
    ]
    assert all(one == alone[0] for one in alone)  # without an image a memory is silent
    behind = [
        kept.measure(model, text, "", drawings(), EXACT)
        for model in (eye(), methods.bare(with_pvm(read=False)), methods.bare(with_pvm(read=True)))
    ]
    assert behind[0] == behind[1]
    assert behind[0]["nll"] != behind[2]["nll"]
    assert len(behind[0]["right"]) == len(kept.QUESTIONS)
    rows = [{**alone[0], "of": kept.EYE}, {**alone[0], "of": "x", "nll": [one + 0.5 for one in alone[0]["nll"]]}]
    assert "+0.500 nats [+0.500, +0.500]" in kept.table(kept.by_name(rows))[-1]


def test_no_image_and_no_method_is_plain_reading():
    """Against the language model's own loss over the same tokens."""
    model, text = language(), tokenizer()
    ids = torch.tensor([text(kept.TEXT.read_text())["input_ids"][: kept.WINDOW]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert kept.measure(model, text, "", None, EXACT)["nll"][0] == pytest.approx(loss, abs=1e-4)


def test_what_is_measured_already_is_kept():
    trained, kept_times = with_pvm(read=True), []
    trial, told = methods.Trial("pvm", 16, 0), [one * 20 for one in TOLD]
    found = {"language": "as it was", "rows": "as they were"}
    measure(trained, tokenizer(), drawings(), EXACT, told, trial, found, lambda: kept_times.append(1), 2, 6, 0)
    assert found.keys() == {"language", "rows", "memories"}
    assert found["rows"] == "as they were"
    assert len(kept_times) == 1
    assert {row["length"] for row in found["memories"]} == {0}


def test_settings_are_chosen_on_what_is_neither_trained_nor_tested():
    told = [[number] for number in range(6)]
    test, validation = methods.Trial("lora", 16, 0), methods.Trial("lora", 16, 0, rate=1e-4, validation=True)
    assert test.narrations(told) == ([[0], [1], [2], [3]], [[4], [5]])
    assert validation.narrations(told) == ([[0], [1], [2]], [[3]])
    assert test.name != validation.name
    images = [lengths.shown(drawings(), EXACT, 2, other)["unseen grids"][0].image for other in (False, True)]
    assert not torch.equal(*images)


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A folder of raw results with narrations, and the tiny eye as the one that was made."""
    about = {"size": "tiny", "sha256": "0" * 64, "settings": {}, "done": True, "cpu_seconds": {}}
    monkeypatch.setattr(commands, "opened", lambda work, *_: Opened(eye(), tokenizer(), EXACT, about, work, "cpu", 1))
    monkeypatch.setattr("studies.eye.drawings.pictures.pictures", lambda *_: drawings())
    monkeypatch.setattr("studies.eye.language.language_model", lambda *_: (language(), tokenizer()))
    turns = [["Go on.", "It was a long way to the sea. " * 10]] * 24
    (tmp_path / narrations.FILE).write_text(json.dumps({"turns": turns}))
    return tmp_path


def asked(world, *words):
    done = CliRunner().invoke(app, [*words, "--work", str(world / "work"), "--results", str(world)])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_leave_raw_results(world):
    assert "| SmolLM2 | 2" in asked(world, "language")
    assert len(json.loads((world / "language-tiny.json").read_text())["rows"]) == 3
    asked(world, "methods", "none", "--images", "2")
    file = world / "methods" / "none.json"
    raw = json.loads(file.read_text())
    assert {row["condition"] for row in raw["rows"]} == {"base", "hidden", "repeated"}
    assert raw["conditions"]["trial"]["parameters"] == 0
    raw["language"] = "what is there is not measured again"
    file.write_text(json.dumps(raw))
    asked(world, "methods", "none", "--images", "2")
    assert json.loads(file.read_text())["language"] == raw["language"]
    asked(world, "methods", "none", "--images", "3")  # other numbers, another measurement
    assert json.loads(file.read_text())["language"] != raw["language"]
    assert "step 0 of 120" in asked(world, "methods", "pvm", "--minutes", "0")
