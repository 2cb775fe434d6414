"""Questions as files: what trainers read lays out the studies' own test, and nothing of it is trained on."""

import dataclasses
import hashlib
import json

import pytest
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from keepsight import cli
from studies.eye import command, lengths, sequences
from studies.eye.language import with_eye
from studies.eye.publishing import data
from studies.eye.publishing.export import export
from studies.eye.publishing.rewards import names
from tests.studies.eye.tiny_eye import SIZE, drawings, language, tokenizer

EXACT = dataclasses.replace(SIZE, dtype="float32")
SAID = "Once upon a time, long ago.\n\nThere was no eye to see it. "
TURN = "<|im_end|>\n<|im_start|>{}\n{}"
TOLD = [
    sequences.narration(SAID + TURN.format("user", "Go on.") + TURN.format("assistant", f"{one}. " * 400), tokenizer())
    for one in ("And then it rained", "Ships came and went", "Nobody was there", "Salt is white", "Gold is yellow")
]
NARRATIONS = [one.ids for one in TOLD]


@pytest.fixture(scope="module", params=[1, 2], ids=["picture", "grid"])
def written(request, tmp_path_factory):
    """(side, folder of the data)."""
    folder = tmp_path_factory.mktemp("data")
    data.write(drawings(), tokenizer(), NARRATIONS, EXACT, request.param, folder, rows=12, images=3, longest=256)
    return request.param, folder


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_the_test_is_the_studies_own(written):
    """Tokens of image, narration and question, wherever the narration is not cut within a user's turn."""
    side, folder = written
    model = with_eye(language(), tokenizer(), EXACT)
    export(model, tokenizer(), EXACT, side, folder / "vlm")
    processor = AutoProcessor.from_pretrained(folder / "vlm")
    these = next(these for these in lengths.shown(drawings(), EXACT, 3).values() if these[0].side == side)
    rows = rows_of(folder, data.TEST)
    assert len(rows) == len(these) * len(lengths.LENGTHS)
    for number, row in enumerate(rows):
        shown, length = these[number // len(lengths.LENGTHS)], lengths.LENGTHS[number % len(lengths.LENGTHS)]
        told = NARRATIONS[-2:][number // len(lengths.LENGTHS) % 2][:length]
        part = lengths.asked(shown.question, "base", told, side * EXACT.tokens, tokenizer(), model.config)
        parts = [[sequences.Part([*told, *part.ids], len(told) + part.answer)]]
        expected = sequences.lay_out(parts, side * EXACT.tokens, model, tokenizer()).ids[0].tolist()
        image = Image.open(folder / row["images"][0])
        messages = [{"role": one["role"], "content": _parts(one["content"])} for one in row["messages"]]
        text = processor.apply_chat_template(messages)
        found = processor(text=[text], images=[image], add_special_tokens=False)["input_ids"][0]
        assert list(found[: len(expected)]) == expected, (number, length)
        assert row["dataset"] == f"{length} tokens"


def _parts(content):
    image, text = "<image>" in content, content.replace("<image>", "")
    return [*([{"type": "image"}] if image else []), *([{"type": "text", "text": text}] if text else [])]


def test_a_narration_that_is_cut_ends_with_what_was_answered():
    shown = _shown()
    for cut in range(len(SAID) + 120):
        messages = data.conversation(shown, NARRATIONS[0][:cut], "a.png", tokenizer())["messages"]
        assert [one["role"] for one in messages[-2:]] == ["user", "assistant"]
        assert all(one["content"].strip() for one in messages)
        said = [one for one in messages[:-1] if one["role"] == "assistant"]
        assert all(one["weight"] == 0 for one in said)
        assert all(one["content"] in tokenizer().decode(NARRATIONS[0][:cut]) for one in said)
        assert len(said) == sum(one["role"] == "user" for one in messages) - 1


def test_nothing_of_the_test_is_trained_on(written):
    _, folder = written
    digests, texts = {}, {}
    for name in (data.TRAIN, data.VALIDATION, data.TEST):
        rows = rows_of(folder, name)
        files = {folder / row["images"][0] for row in rows}
        digests[name] = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        assert len(digests[name]) == len(files), "each image is drawn once"
        words = {one["content"] for row in rows for one in row["messages"] if one.get("weight") == 0}
        texts[name] = {word for word in words if word not in SAID}
    assert digests[data.TEST].isdisjoint(digests[data.TRAIN] | digests[data.VALIDATION])
    assert digests[data.TRAIN].isdisjoint(digests[data.VALIDATION])
    assert len(digests[data.TRAIN]) == len(rows_of(folder, data.TRAIN)) == 12
    assert texts[data.TEST].isdisjoint(texts[data.TRAIN])


def test_training_can_be_where_images_are_forgotten(tmp_path):
    """Behind longer narrations and with bolder drawings; what is tested on stays as it is."""
    settings = {"near": {}, "far": {"shortest": 256}, "bold": {"bold": 1.0}}
    found = {}
    for name, more in settings.items():
        data.write(drawings(), tokenizer(), NARRATIONS, EXACT, 1, tmp_path / name, 8, 2, 256, **more)
        rows = rows_of(tmp_path / name, data.TRAIN)
        found[name] = [(_between(row), (tmp_path / name / row["images"][0]).read_bytes()) for row in rows]
        assert rows_of(tmp_path / name, data.TEST) == rows_of(tmp_path / "near", data.TEST)
    whole = {_between(data.conversation(_shown(), told[:256], "a.png", tokenizer())) for told in NARRATIONS[:2]}
    assert {between for between, _ in found["far"]} <= whole
    assert not {between for between, _ in found["near"]} <= whole
    assert {image for _, image in found["bold"]}.isdisjoint(image for _, image in found["near"])


def _shown():
    return lengths.shown(drawings(), EXACT, 2)[lengths.STYLE][0]


def _between(row):
    return tuple(one["content"] for one in row["messages"][1:-2])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["data", "folder", "--longest", "4096"], "a narration has 2048 tokens"),
        (["data", "folder", "--shortest", "300"], "expected at most --longest, which is 256"),
        (["methods", "lora", "--longest", "4096"], "a narration has 2048 tokens"),
    ],
)
def test_a_length_that_no_narration_has_is_refused(more, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(command.app, more)
    assert done.exit_code != 0
    assert told in str(done.exception)


def test_share_alike_drawings_are_tested_alone(written):
    side, folder = written
    told = (folder / "README.md").read_text()
    assert "Not to be published" in told
    assert ("| emojione-v1 |" in told) == (side == 1)
    assert all(line.rstrip("| ").endswith("| test") for line in told.splitlines() if "| CC-BY-SA" in line)


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_the_check_finds_nothing_wrong(written, kind):
    _, folder = written
    done = CliRunner().invoke(cli.app, ["data", "check", str(folder / "train.jsonl"), "--for", kind])
    assert done.exit_code == 0, done.output
    assert "12 of 12 are good" in done.output.replace("\n", " ")


def test_a_thing_that_is_named_in_other_words_earns_a_reward():
    said = ["A teapot.", "it is a Fire engine, or", "A tea.", [{"role": "assistant", "content": "an apple"}]]
    assert names(said, answer=["A teapot.", "A fire engine.", "A teapot.", "An apple."], other="x") == [1, 1, 0, 1]
