"""The battery tells a memory that is used from one that is not, and the half-way swap acts where it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import Row, TinyFamily, make_inputs
from forced import forced_open
from helpers import attach, with_continuation

from keepsight.compat import cache_argument, find_output_cache
from keepsight.diagnose import Battery, Reader, memory_of
from keepsight.diagnose.battery.verdict import verdict_from
from keepsight.diagnose.memories.pvm import remembered
from keepsight.diagnose.memories.tampering import matched_noise, mixed_from, taken_from
from keepsight.diagnose.statistics import Estimate, estimate
from keepsight.lab.cases import DigitGrids
from keepsight.pvm import memory_off, replace_memory, swap_memory

LONG = 2048


def run(battery: Battery) -> Any:
    for _ in battery.run():
        pass
    return battery.result()


def half(result: Any, name: str) -> Any:
    return next(h for h in result.half_way if h.name == name)


def test_trained_memory_is_used_and_follows_a_swap(with_memory: tuple[Any, Any]) -> None:
    reader = Reader(*with_memory)
    result = run(Battery(reader, cases=DigitGrids(reader.processor).cases(6, LONG)))
    assert result.verdict.word == "used", result.verdict.sentence
    conditions = {c.name: c for c in result.conditions}
    assert set(conditions) == {
        "off", "zeroed", "matched noise", "shuffled across samples", "other image", "scaled x0.5", "scaled x2",
    }  # fmt: skip
    assert conditions["off"].score == conditions["zeroed"].score, "an empty memory says nothing"
    assert abs(conditions["scaled x2"].score.value) < 0.1, "the look-up normalises its keys"
    for name in ("image swapped", "memory swapped"):
        swapped = half(result, name)
        assert swapped.follows.low > swapped.stays.high, name
    assert half(result, "image removed").stays.value < 0.3


def test_base_does_not_follow_at_long_lengths(reference: tuple[Any, Any]) -> None:
    reader = Reader(*reference)
    result = run(Battery(reader, cases=DigitGrids(reader.processor).cases(6, 4096)))
    assert result.verdict.word == "no memory attached"
    assert result.method is None
    assert not result.conditions
    assert half(result, "image swapped").follows.high < 0.3
    short = run(Battery(reader, cases=DigitGrids(reader.processor).cases(6, 64)))
    assert half(short, "image swapped").follows.low > 0.8, "in short outputs it does, so the measure can see it"


@pytest.mark.parametrize("references", [True, False])
def test_random_block_with_an_open_gate_is_not_used(with_memory: tuple[Any, Any], references: bool) -> None:
    model, processor = with_memory
    reader = Reader(forced_open(model), processor)
    cases = DigitGrids(processor).cases(6 if references else 5, 1024 if references else 64)
    given: dict[str, Any] = {"cases": cases} if references else {"samples": [c.sample for c in cases], "steps": 24}
    result = run(Battery(reader, **given))
    assert result.verdict.word == "not used", result.verdict.sentence
    off = next(c for c in result.conditions if c.name == "off")
    assert off.logprob.value != 0, "it does change the output"


def test_trained_memory_is_used_also_without_references(with_memory: tuple[Any, Any]) -> None:
    reader = Reader(*with_memory)
    samples = [case.sample for case in DigitGrids(reader.processor).cases(5, 64)]
    result = run(Battery(reader, samples=samples, steps=40))
    assert result.verdict.word == "used", result.verdict.sentence
    assert result.intact_score is None
    changed = {c.name: c.changed for c in result.conditions}
    assert changed["off"].value > 0
    assert half(result, "image swapped").changed.value > 0
    assert half(result, "unchanged").changed is None


def test_one_sample_gets_stand_ins_and_smaller_units(with_memory: tuple[Any, Any]) -> None:
    reader = Reader(*with_memory)
    sample = DigitGrids(reader.processor).cases(1, 64)[0].sample
    result = run(Battery(reader, samples=[sample], steps=64))
    assert result.units == "blocks of 16 tokens"
    assert result.verdict.figure.n == 4
    few = run(Battery(reader, samples=[sample], steps=20))
    assert few.verdict.word == "not enough data"


def test_questions_that_nobody_answers_tell_nothing(with_memory: tuple[Any, Any]) -> None:
    """Where no answer is right with the right image either, no score can fall: that is no proof of disuse."""
    reader = Reader(*with_memory)
    cases = []
    for case in DigitGrids(reader.processor).cases(3, 64):
        text = case.text.clone()
        for start, end in case.scored:
            text[start:end] = reader.processor.tokenizer.convert_tokens_to_ids("read")
        cases.append(replace(case, text=text))
    verdict = run(Battery(reader, cases=cases)).verdict
    assert verdict.word == "not enough data"
    assert "no answer is right" in verdict.rule


def test_stopping_leaves_whole_samples_only(with_memory: tuple[Any, Any]) -> None:
    reader = Reader(*with_memory)
    battery = Battery(reader, cases=DigitGrids(reader.processor).cases(4, 32))
    steps = battery.run()
    next(steps)
    next(steps)
    result = battery.result()
    assert result.samples == 2
    assert result.units == "answers"
    assert all(c.logprob.n == 12 for c in result.conditions)


@pytest.mark.parametrize(
    ("figure", "word"),
    [
        (Estimate(0.3, 0.2, 0.4, 9), "used"),
        (Estimate(0.03, 0.01, 0.05, 9), "barely used"),
        (Estimate(0.3, -0.01, 0.6, 9), "not used"),
        (Estimate(-0.3, -0.4, -0.2, 9), "not used"),
    ],
)
def test_rule(figure: Estimate, word: str) -> None:
    verdict = verdict_from(figure, "of task score", 0.05)
    assert verdict.word == word
    assert word in verdict.sentence
    assert f"{figure.value:+.3f}" in verdict.sentence
    assert "0.05" in verdict.rule


def test_interval_of_a_mean() -> None:
    inside = 0
    for seed in range(60):
        values = np.random.default_rng(seed).normal(1.0, 2.0, 40)
        found = estimate(values)
        assert found.low < found.value < found.high
        inside += found.low <= 1.0 <= found.high
    assert inside >= 50


# -- the tools in keepsight.pvm ---------------------------------------------------------------------------------------
def test_swap_acts_on_the_memory_in_the_cache(family: TinyFamily) -> None:
    """After a swap, decoding equals a run whose memory was the other image's from that point on."""
    model = family.build()
    mine = make_inputs(family, model, [Row(2, (2, 2), 6, seed=1)])
    theirs = make_inputs(family, model, [Row(2, (2, 2), 6, seed=2)])
    model = attach(model)
    tail = torch.tensor([[7, 8, 9]])
    memory = memory_of(model)
    assert memory is not None
    with torch.no_grad():
        with remembered() as seen:
            donor = find_output_cache(model(**theirs, use_cache=True))
        caches = [find_output_cache(model(**mine, use_cache=True)) for _ in range(3)]
        swap_memory(caches[1], donor)
        swap_memory(caches[2], caches[0])
        plain, swapped, same = (model(input_ids=tail, **cache_argument(model, cache)).logits for cache in caches)
        assert torch.equal(plain, same), "its own memory changes nothing"
        assert (plain - swapped).abs().max() > 1e-3

        # The prompt's own keys must stay those of the first image: read it with the memory off, then on.
        whole = model(**with_continuation(mine, tail), use_cache=False).logits[:, -3:]
        torch.testing.assert_close(plain, whole, rtol=0, atol=2e-5)
        with replace_memory(lambda embeds, valid: seen[0].to(embeds)):
            everywhere = model(**with_continuation(mine, tail), use_cache=False).logits[:, -3:]
        assert (everywhere - swapped).abs().max() > 1e-6, "only what comes after the swap is changed"


def test_swap_refuses_what_has_no_memory(family: TinyFamily) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [Row(2, (2, 2), 4)])
    with torch.no_grad():
        bare = find_output_cache(model(**inputs, use_cache=True))
    with pytest.raises(ValueError, match="holds no visual memory"):
        swap_memory(bare, bare)


def test_memory_off_is_the_base_and_is_undone(family: TinyFamily) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [Row(2, (2, 2), 4)])
    with torch.no_grad():
        base = model(**inputs).logits
        model = attach(model)
        trainable = [p.requires_grad for p in model.parameters()]
        on = model(**inputs).logits
        with memory_off(model):
            assert torch.equal(model(**inputs).logits, base)
            assert memory_of(model) is None
        assert torch.equal(model(**inputs).logits, on)
    assert not torch.equal(on, base)
    assert trainable == [p.requires_grad for p in model.parameters()]


def test_control_branch_is_no_memory() -> None:
    from families import BY_NAME

    assert memory_of(attach(BY_NAME["qwen3_vl"].build(), branch="mlp")) is None


def test_changes_keep_what_they_promise() -> None:
    embeds = torch.randn(1, 200, 8) * 3 + 1
    [noise] = matched_noise(0)([embeds])
    torch.testing.assert_close(noise.mean(1), embeds.mean(1), rtol=0, atol=0.8)
    torch.testing.assert_close(noise.std(1), embeds.std(1), rtol=0.2, atol=0)
    assert not torch.equal(noise, embeds)
    others = [[torch.full((1, 200, 8), float(k))] for k in range(3)]
    [mixed] = mixed_from(others, 1)([embeds])
    assert set(mixed.unique().tolist()) == {0.0, 1.0, 2.0}
    [taken] = taken_from([torch.arange(4.0)[None, :, None].expand(1, 4, 8)])([embeds])
    assert taken.shape == embeds.shape
