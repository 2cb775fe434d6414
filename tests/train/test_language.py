"""Texts beside the batches: what the base expects of them behind an image is what the memory may not change."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TinyFamily
from family_processors import family_folder
from peft import get_peft_model
from safetensors.torch import load_file
from tiny_training import QUICK, draw_digit, make_data, read_rows, write_rows

import keepsight
from keepsight.data.collate import IGNORED, ConversationCollator
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.pvm.blindfold import BlindfoldSchedule, blindfold
from keepsight.train.pvm.language import TOKENS, Pieces, divergence, has_pieces
from keepsight.train.pvm.sft import SftSettings, train_pvm
from keepsight.train.run.controls import parse_controls

WEIGHTS = "adapter_model.safetensors"
WORDS = "the light line falls over a quiet canvas . near b2 a thin stroke slowly bends . "
PVM = keepsight.PvmConfig(layers=[1, 3], width=32)


def settings(**changes: Any) -> SftSettings:
    return SftSettings(**(QUICK | changes))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(WORDS * 100)
    return path


def piece_batch(processor: Any, said: str = WORDS) -> dict[str, torch.Tensor]:
    messages = [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
    ]
    return ConversationCollator(processor)([{"messages": messages, "images": [draw_digit(4)]}])


def test_divergence_is_the_mean_over_the_piece_and_nothing_where_gates_are_shut(
    family: TinyFamily, tmp_path: Path
) -> None:
    model, processor = keepsight.load(family_folder(family, tmp_path / "base"))
    model = get_peft_model(model, copy.deepcopy(PVM))
    batch = piece_batch(processor)
    assert divergence(model, model.disable_adapter, batch).item() == 0.0
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            parameter.data.fill_(0.5)
    with torch.no_grad():
        found = divergence(model, model.disable_adapter, batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        on = model(**inputs).logits.float().log_softmax(-1)
        with model.disable_adapter():
            off = model(**inputs).logits.float().log_softmax(-1)
    learned = (batch["labels"][0] != IGNORED).nonzero()[:, 0]
    apart = [(off[0, at - 1].exp() * (off[0, at - 1] - on[0, at - 1])).sum() for at in learned]
    assert found.item() > 0
    torch.testing.assert_close(found, torch.stack(apart).mean(), rtol=1e-3, atol=1e-6)


def test_texts_hold_what_is_expected_behind_an_image(texts: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    found = {}
    for name, keep in (("with", str(texts)), ("without", None)):
        logs: list[dict[str, float]] = []
        train_pvm(
            "keepsight/reference",
            data,
            tmp_path / name,
            settings=settings(max_steps=40, keep_language=keep),
            on_log=lambda values, step, total, logs=logs: logs.append(values),
        )
        assert any("language_divergence" in values for values in logs) == (keep is not None)
        assert ("nats a token from the base" in (tmp_path / name / "README.md").read_text()) == (keep is not None)
        model, processor = keepsight.load(tmp_path / name)
        with torch.no_grad():
            found[name] = divergence(model, model.disable_adapter, piece_batch(processor)).item()
    assert found["without"] > 0.5, "a branch that learns answers moves texts, or there is nothing to hold"
    assert found["with"] < found["without"] / 2


def test_a_resumed_run_is_the_unbroken_one_and_other_texts_are_refused(
    tiny_vlm: Path, texts: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data")
    with_texts = settings(keep_language=str(texts), grad_accum=2)
    train_pvm(tiny_vlm, data, tmp_path / "whole", settings=with_texts)
    train_pvm(tiny_vlm, data, tmp_path / "broken", settings=with_texts)
    for name in (WEIGHTS, "adapter_config.json"):
        (tmp_path / "broken" / name).unlink()

    shutil.rmtree(tmp_path / "broken" / "checkpoint-12")
    moved = texts.rename(tmp_path / "moved.txt")
    with_texts = settings(keep_language=moved, grad_accum=2)
    train_pvm(tiny_vlm, data, tmp_path / "broken", settings=with_texts, resume=True)
    whole, broken = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "broken" / WEIGHTS)
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())
    moved.write_text("this old brush rests here . " * 200)
    with pytest.raises(KeepsightError, match="digest of the texts"):
        train_pvm(tiny_vlm, data, tmp_path / "broken", settings=with_texts, resume=True)


def test_a_step_of_several_batches_is_the_step_of_one(tiny_vlm: Path, texts: Path, tmp_path: Path) -> None:
    """The divergence is a mean over a step's batches, whether the loss is a sum already or is divided later."""
    data = make_data(tmp_path / "data", count=8)
    # one row, eight times: each batch is the same, so a step of one and of four have the same gradient
    row = read_rows(data)[0]
    write_rows(data, [row] * 8)
    texts.write_text(WORDS)  # one piece
    found = []
    for accum in (1, 4):
        train_pvm(
            tiny_vlm,
            data,
            tmp_path / f"of-{accum}",
            settings=settings(max_steps=4, batch_size=1, grad_accum=accum, keep_language=str(texts)),
        )
        found.append(load_file(tmp_path / f"of-{accum}" / WEIGHTS))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_piece_is_seen_though_its_batch_is_blindfolded(
    tiny_vlm: Path, texts: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    seen = []

    def look(model: Any, off: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), off():
            now = model(**inputs).logits
            with blindfold(model):
                blind = model(**inputs).logits
        seen.append(not torch.equal(now, blind))
        return divergence(model, off, batch)

    monkeypatch.setattr("keepsight.train.pvm.sft_trainer.divergence", look)
    data = make_data(tmp_path / "data")
    train_pvm(
        tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=6, blindfold_steps=6, keep_language=str(texts))
    )
    assert seen
    assert all(seen)


def test_the_piece_beside_a_batch_follows_from_its_samples(tiny_vlm: Path, texts: Path) -> None:
    collator = ConversationCollator(keepsight.load(tiny_vlm)[1])
    pieces = Pieces.read(texts, collator, seed=3)
    assert len(pieces.texts) > 3
    for text in pieces.texts:
        assert 0 < len(collator.tokenizer(text, add_special_tokens=False)["input_ids"]) <= TOKENS + 2
    samples = [{"messages": [], "images": []}, {"messages": [], "images": ["first", "second"]}]
    drawn = [pieces.beside(samples, [place, 7]) for place in range(100)]
    assert all(one["images"] == ["first"] for one in drawn)
    assert len({json.dumps(one["messages"]) for one in drawn}) == len(pieces.texts)
    assert drawn == [pieces.beside(samples, [place, 7]) for place in range(100)]
    alone = pieces.beside([{"messages": [], "images": []}], [0])
    assert alone["images"] == []
    assert (collator([alone])["labels"] != IGNORED).sum() > 1


def test_controls_that_can_be_taken_off_are_held_as_the_memory_is(tiny_vlm: Path, texts: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", count=20)
    report = train_pvm(
        tiny_vlm,
        data,
        tmp_path / "out",
        settings=settings(max_steps=6, keep_language=str(texts)),
        controls=parse_controls(["lora,mlp,sft"]),
    )
    for control, held in (("lora", True), ("mlp", True), ("sft", False)):
        state = tmp_path / "out" / f"control-{control}" / "checkpoint-6" / "trainer_state.json"
        logged = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        assert any("language_divergence" in entry for entry in logged) == held, control
    assert "but for sft" in (tmp_path / "out" / "comparison.md").read_text()
    assert report.comparison is not None


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("texts.txt", b"", "holds no text"),
        ("texts.txt", b"\xff\xfe\x00\x81", "no text in UTF-8"),
        ("texts.txt", b"see <|image_pad|> here", "stands for an image"),
        ("texts.jsonl", b'{"text": "good"}\n{"said": "bad"}\n', "line 2: expected one JSON object"),
        ("texts.txt", b"read the <eos> a1", "a token with a meaning of its own"),
        ("texts.txt", "\u4f60\u597d ".encode() * 20, "cannot read 100%"),
        ("texts.json", b'["read the a1"]', "no plain text"),
        ("texts.jsonl", b'{"text": "read \\ud800 the"}\n', "line 1: expected one JSON object"),
        ("texts.jsonl", b"plain\n", "line 1: expected one JSON object"),
        ("texts.jsonl", b"\n\n", "holds no text"),
    ],
)
def test_texts_that_are_none_are_refused_before_any_weight_is_read(
    tiny_vlm: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    data = make_data(tmp_path / "data")
    with pytest.raises(KeepsightError, match=told):
        train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(keep_language=str(tmp_path / name)))
    assert not (tmp_path / "out").exists()


def test_what_ends_a_line_elsewhere_does_not_in_json(tiny_vlm: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_bytes('\ufeff{"text": "read\u2028the\u0085a1"}\r\n\r\n{"text": "b2"}'.encode())
    assert len(Pieces.read(file, ConversationCollator(keepsight.load(tiny_vlm)[1]), 0).texts) == 2


def test_steps_with_a_piece_are_blindfolded_and_sighted_alike() -> None:
    for total in (100, 310, 316, 318, 320, 1000, 1002):
        schedule = BlindfoldSchedule.default(total)
        later = [schedule.covers(step) for step in range(schedule.steps, total) if has_pieces(step)]
        assert abs(len(later) - (total - schedule.steps) / 2) <= 2
        assert abs(sum(later) - len(later) / 2) <= 1


def test_a_limit_on_samples_is_none_on_texts_and_the_loss_is_of_answers(
    tiny_vlm: Path, texts: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data")
    logs: list[dict[str, float]] = []
    changes = {"max_steps": 4, "logging_steps": 1, "max_length": 32, "over_long": "truncate", "lr": 0.1}
    train_pvm(
        tiny_vlm,
        data,
        tmp_path / "out",
        settings=settings(**changes, keep_language=texts),
        on_log=lambda values, step, total: logs.append(values),
    )
    told = [values for values in logs if "loss" in values]
    assert ["language_divergence" in values for values in told] == [False, False, True, True]
    sight = [values.get("blindfolded_loss", values.get("sighted_loss")) for values in told]
    assert [values["loss"] for values in told] == pytest.approx(sight, abs=1e-3)


@pytest.mark.parametrize(("answer", "hint"), [("a1 7 .", True), ("a1 7 . " * 20, False)])
def test_short_answers_without_texts_are_told(
    tiny_vlm: Path, texts: Path, tmp_path: Path, answer: str, hint: bool
) -> None:
    data = make_data(tmp_path / "data")
    rows = read_rows(data)
    for row in rows:
        row["messages"] = [
            {"role": "user", "content": "describe"},
            {"role": "assistant", "content": "b2 3 . " * 30, "weight": 0},
            {"role": "user", "content": "describe"},
            {"role": "assistant", "content": answer},
        ]
    write_rows(data, rows)
    said: list[str] = []
    for name, keep in (("without", None), ("with", texts)):
        said.clear()
        train_pvm(tiny_vlm, data, tmp_path / name, settings=settings(max_steps=3, keep_language=keep), say=said.append)
        assert any("--keep-language FILE" in line for line in said) == (hint and keep is None)


def test_a_run_too_short_for_any_text_says_so(tiny_vlm: Path, texts: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    with pytest.warns(KeepsightWarning, match="no step with a text"):
        train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=2, keep_language=texts))


def test_a_file_that_is_missing_is_named(tiny_vlm: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(keep_language=str(tmp_path / "nowhere.txt")))
