"""The whole diagnosis: built-in tasks, odd inputs, stopping early, results that can be read back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keepsight.diagnose import LengthScore, Reader, Sample, Settings, examine, read_dataset, read_results
from keepsight.diagnose.battery.lengths import contains
from keepsight.diagnose.report import render_report, save_charts
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.lab.cases import DigitGrids
from keepsight.lab.narration import DIGITS, TOKEN
from keepsight.lab.reference import build_processor

QUICK = Settings(steps=24, causal_steps=16, samples=2)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(diagnosis: Any, folder: Path) -> dict[str, Any]:
    diagnosis.save(folder / "results.json")
    assert "<html" in render_report(diagnosis)
    return read_results(folder / "results.json")


def test_base_falls_and_has_no_memory(reference: tuple[Any, Any], tmp_path: Path) -> None:
    """With no arguments at all but fewer samples."""
    found = examine(*reference, settings=Settings(steps=192, samples=2, curves=3), task=DigitGrids.of(reference[1]))
    assert found.written.decay.high < 0, found.written.decay.sentence
    assert found.causal.verdict.word == "no memory attached"
    assert found.written_off is None
    assert found.retrieval is None
    assert found.lengths is not None
    assert len(found.lengths.quartiles) == 4
    read = saved(found, tmp_path)
    assert read["written"]["decay"]["slope"] == pytest.approx(found.written.decay.slope, rel=1e-5)
    assert np.array(read["written"]["attention"][0]["mass"]).shape == (192, 4, 1)


def test_memory_on_one_image(with_memory: tuple[Any, Any], tmp_path: Path) -> None:
    sample = Sample("describe", (picture(40, 30),))
    found = examine(*with_memory, [sample], QUICK)
    assert found.written_off is not None
    assert found.lens_off is not None
    assert found.retrieval.weights.shape[:2] == (24, 2)
    assert len(found.written.words) == len(found.written.ids) == 24
    assert saved(found, tmp_path)["retrieval"]["layers"] == [1, 3]
    assert {file.name for file in save_charts(found, tmp_path)} == {"decay.svg", "layers.svg", "lens.svg", "causal.svg"}
    assert found.lengths is None


ODD = {
    "text only": Sample("describe the"),
    "three images": Sample("describe", (picture(40, 30), picture(100, 200), picture(64, 64))),
    "one pixel": Sample("describe", (picture(1, 1),)),
    "very wide": Sample("describe", (picture(12000, 80),)),
    "video": Sample("describe", (), (np.stack([np.asarray(picture(64, 48, i)) for i in range(6)]),)),
    "image and video": Sample("describe", (picture(30, 50),), (np.zeros((4, 32, 32, 3), np.uint8),)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("memory", [False, True], ids=["base", "memory"])
def test_odd_inputs(name: str, memory: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model, processor = request.getfixturevalue("with_memory" if memory else "reference")
    found = examine(model, processor, [ODD[name]], QUICK)
    sees = name != "text only"
    assert (found.written.decay is not None) == sees
    assert (found.retrieval is not None) == (sees and memory)
    assert any("No prompt has an image" in note for note in found.notes) == (not sees)
    if sees:
        layout = found.written.attention[0].layouts[0]
        assert len(layout.items) == len(ODD[name].images) + len(ODD[name].videos)
        assert all(item.height and item.width for item in layout.items)
        assert sum(i.frames * i.height * i.width for i in layout.items) == len(layout.slots)
    saved(found, tmp_path)


def test_what_no_processor_can_read_is_a_lesson(reference: tuple[Any, Any]) -> None:
    with pytest.raises(KeepsightError, match="cannot read 12000x1"):
        examine(*reference, [Sample("describe", (picture(12000, 1),))], QUICK)


@pytest.mark.parametrize(
    "stage", ["writing", "writing without the memory", "logit lens", "tampering", "score by length"]
)
def test_ctrl_c_keeps_what_was_measured(stage: str, with_memory: tuple[Any, Any], tmp_path: Path) -> None:
    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done >= min(1, total):
            raise KeyboardInterrupt

    samples = [
        Sample("describe", (picture(32, 32, i),), answer="a1 3", reply="the soft line " * (i + 1)) for i in range(2)
    ]
    found = examine(*with_memory, samples, QUICK, progress=stop)
    assert found.interrupted
    assert found.written is not None, "also the unfinished output is kept"
    assert (found.written_off is None) == (stage in ("writing", "writing without the memory"))
    assert (found.causal is None) == (stage not in ("tampering", "score by length"))
    assert saved(found, tmp_path)["interrupted"] is True


def test_measuring_does_not_change_the_random_state_or_the_model(with_memory: tuple[Any, Any]) -> None:
    import torch

    model, processor = with_memory
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    a = examine(model, processor, [Sample("describe", (picture(32, 32),))], QUICK)
    assert torch.equal(state, torch.get_rng_state())
    b = examine(model, processor, [Sample("describe", (picture(32, 32),))], QUICK)
    assert a.written.words == b.written.words, "the same seed writes the same text"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_score_by_length_finds_the_fall_and_the_gain(with_memory: tuple[Any, Any], reference: tuple[Any, Any]) -> None:
    reader = Reader(*with_memory)
    cases = [case for length in (32, 128, 1024, 2048) for case in DigitGrids(reader.processor).cases(4, length, seed=3)]
    score = LengthScore(reader, cases, control=Reader(*reference))
    for _ in score.run():
        pass
    first, *_, last = score.result().quartiles
    assert first.longest < last.shortest
    assert first.accuracy["base"].low > last.accuracy["base"].high, "the base falls"
    assert last.gain.low > 0, "the memory helps where it falls"
    assert last.relative_gain > 0.2
    for quartile in score.result().quartiles:
        assert quartile.accuracy["control"] == quartile.accuracy["base"], "the base as its own control"


def test_free_answers_are_scored_by_containment(reference: tuple[Any, Any]) -> None:
    reader = Reader(*reference)
    case = DigitGrids(reader.processor).cases(1, 32)[0]
    digit = DIGITS[int(case.facts[0]) - TOKEN[DIGITS[0]]]
    samples = [Sample("read", case.sample.images, answer=f"a1 {digit}")] * 4
    samples += [Sample("read", case.sample.images, answer="d9")] * 4
    score = LengthScore(reader, samples=samples, steps=64)
    for _ in score.run():
        pass
    (only,) = score.result().quartiles  # all of one length, so there is nothing to compare
    assert only.shortest == only.longest
    assert only.accuracy["base"].value * only.accuracy["base"].n == 4
    assert contains("It is A Cat.", "a cat")
    assert not contains("It is a category", "a cat")


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        (range(8), [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ([4, 4, 4, 4, 4, 5, 9, 9], [(4, 5), (9, 9)]),
        ([9, 5, 4, 4, 4, 4, 4, 4], [(4, 4), (5, 9)]),
        ([7] * 9, [(7, 7)]),
    ],
)
def test_answers_of_one_length_stay_together(lengths: Any, parts: Any, reference: tuple[Any, Any]) -> None:
    score = LengthScore(Reader(*reference), samples=[Sample("read", [], answer="x")])
    score._lengths, score._right = list(lengths), {"base": [True] * len(lengths)}
    found = score.result().quartiles
    assert sum(q.accuracy["base"].n for q in found) == len(lengths)
    assert [(q.shortest, q.longest) for q in found] == parts


TWO = [{"role": role, "content": "read"} for role in ("user", "assistant", "user", "assistant")]


def test_dataset(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    picture(2048, 9).save(tmp_path / "long.png")
    (tmp_path / "bad.png").write_bytes(b"x")
    lines = [{"image": "a.png", "prompt": "read", "answer": 7}, {"images": ["a.png", "a.png"], "prompt": "read"}]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = read_dataset(path)
    assert (first.answer, len(second.images), second.answer) == ("7", 2, None)
    words = {
        "messages": [{"role": "user", "content": "is <image> like <image>?"}, {"role": "assistant", "content": "no"}]
    }
    path.write_text(json.dumps({"images": ["a.png", "a.png"], "reply": "it is", "level": 3, **words}))
    with pytest.warns(KeepsightWarning, match="not used: level"):
        (sample,) = read_dataset(path)
    assert (sample.prompt, sample.before, sample.answer, sample.reply) == ("?", ("is", "like"), "no", "it is")
    kinds = [part.get("text", part["type"]) for part in sample.content]
    assert kinds == ["is", "image", "like", "image", "?"]
    for line, lesson in (
        ("{", "line 1: not valid JSON"),
        ('{"image": "a.png"}', r"no format that keepsight knows. It has: image\."),
        (
            '{"image": "a.png", "prompt": "<|image_pad|>"}',
            r"line 1, messages\[0\]: the token <.image_pad.> in the words",
        ),
        ('{"image": "a.png", "prompt": "x", "videos": ["a.mp4"]}', "line 1, videos: videos"),
        ('{"image": "a.png", "prompt": "read", "answer": "<|image_pad|>"}', "line 1, answer: the token <.image_pad.>"),
        ('{"image": "bad.png", "prompt": "x"}', r"line 1, images\[0\]: .* not an image that Pillow can read"),
        ('{"image": "long.png", "prompt": "read"}', r"line 1, images\[0\]: 2048 x 9 pixels"),
        ("", "no samples"),
    ):
        path.write_text(line)
        for processor in (None, build_processor()):
            with pytest.raises(KeepsightError, match=lesson):
                read_dataset(path, processor=processor)


def test_conversations_are_asked_as_they_are(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    """The words before the question, pictures among them, are what the chat template would write of the data."""
    reader = Reader(*reference)
    for name in ("a.png", "b.png"):
        picture(8, 8).save(tmp_path / name)
    messages = [{"role": "system", "content": "read"}, *TWO[:2], *TWO[2:]]
    messages[3] = {"role": "user", "content": "read <image> <image>"}  # no words behind them
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"images": ["a.png", "b.png"], "messages": messages}))
    (sample,) = read_dataset(path, processor=reader.processor)
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant", "user"]
    assert (sample.answer, sample.prompt, len(sample.images)) == ("read", "", 2)
    written = reader.processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert written == f"<bos> read read :  read<eos> read{image}{image} :"
    for images in ((), sample.images[:1], sample.images):  # another sample's pictures are never too few
        assert reader.inputs(replace(sample, images=images))["input_ids"].shape[0] == 1


def test_pictures_of_earlier_turns(tmp_path: Path, reference: tuple[Any, Any]) -> None:
    reader = Reader(*reference)
    picture(8, 8).save(tmp_path / "a.png")
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"images": ["a.png"], "messages": TWO}))
    (sample,) = read_dataset(path, processor=reader.processor)
    assert [[part["type"] for part in message["content"]] for message in sample.messages] == [
        ["image", "text"],
        ["text"],
        ["text"],
    ]
    blind = reader.inputs(replace(sample, images=()))["input_ids"]
    assert blind.shape[1] < reader.inputs(sample)["input_ids"].shape[1]


def test_results_of_another_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"schema": "keepsight.diagnose/99"}')
    with pytest.raises(KeepsightError, match="diagnose/99"):
        read_results(path)
    path.write_text("[")
    with pytest.raises(KeepsightError, match="no results"):
        read_results(path)
