"""VisMem under the diagnosis: readings equal generation, the battery tells image from noise, the probe tells constant
latents from those that hold an image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import Row

sys.path.append(str(Path(__file__).parents[1] / "vismem"))
from vismem_helpers import WordsAndMemory, built

import keepsight
from keepsight.backbone import Backbone
from keepsight.diagnose import (
    AttentionMeter,
    Battery,
    InvocationCount,
    Probe,
    Reader,
    Sample,
    Settings,
    VisMemHandle,
    examine,
    memory_of,
    watch_forming,
)
from keepsight.diagnose.battery.invocations import repetition, tenth
from keepsight.diagnose.battery.linear import linear_probe, shuffled
from keepsight.diagnose.memories.invoked import forced, parsed
from keepsight.errors import KeepsightError
from keepsight.lab.cases import DigitGrids
from keepsight.vismem import replace_latents, splice

PLAN = ((0, "long"), (3, "short"), (3, "long"), (9, "short"))


class Bare(Reader):
    """A reader of tensors, for tiny models that have no processor."""

    def __init__(self, model: Any):
        self.model, self.processor, self.backbone = model, None, Backbone.of(model)
        self.latent_tokens = VisMemHandle(model).tokens


# One of every kind of vision encoder, whose language models see the image from every layer (no sliding windows).
NAMES = ("qwen2_5_vl", "qwen3_vl", "internvl_qwen3", "llava_onevision", "paligemma", "pixtral", "idefics3", "glm4v")


@pytest.fixture(scope="module", params=NAMES)
def tiny(request: pytest.FixtureRequest) -> tuple[Bare, VisMemHandle, dict[str, torch.Tensor]]:
    model, inputs = built(request.param, [Row(3, (2, 2), 4, seed=1)])
    return Bare(model), VisMemHandle(model), inputs


def test_reading_forms_the_memories_that_generation_forms(tiny: Any) -> None:
    reader, memory, inputs = tiny
    plan = ((0, "long"), (3, "short"), (9, "long"))
    options = {"logits_processor": [WordsAndMemory()]}
    output = reader.output(inputs, 14, memory=forced(plan), **options)
    assert output.plan == plan
    assert len(output.text) == 14
    contents = memory.contents(reader, inputs, output.text, plan)
    for formed, recorded in zip(contents, output.invocations, strict=True):
        torch.testing.assert_close(formed[0], recorded.latents, rtol=0, atol=3e-5)
    masked = WordsAndMemory()(None, memory.read(reader, inputs, output.text, plan))
    assert torch.equal(masked.argmax(-1), output.text), "greedy text is the likeliest in its own reading"
    off = WordsAndMemory()(None, memory.read(reader, inputs, output.text, ()))
    assert not torch.equal(off.argmax(-1), output.text), "without the memories it is not"


def test_given_contents_stand_where_their_own_would(tiny: Any) -> None:
    reader, memory, inputs = tiny
    text = torch.arange(30, 42)
    contents = memory.contents(reader, inputs, text, PLAN)
    own = memory.read(reader, inputs, text, PLAN)
    assert torch.equal(own, memory.read(reader, inputs, text, PLAN, contents))
    zeros = [torch.zeros_like(part) for part in contents]
    assert (own.exp() - memory.read(reader, inputs, text, PLAN, zeros).exp()).abs().max() > 1e-4
    with memory.off():
        assert torch.equal(reader.read(inputs, text), memory.read(reader, inputs, text, ()))


def test_placing_and_parsing_are_inverse(tiny: Any) -> None:
    _, memory, _ = tiny
    text = torch.arange(30, 42)
    placed = memory.place(text, PLAN)
    assert torch.equal(placed.ids[placed.slots], text)
    back, plan = parsed(placed.ids, memory.tokens)
    assert torch.equal(back, text)
    assert plan == PLAN


def test_meter_sees_the_latents(tiny: Any) -> None:
    """The mass on latents is that of one uncached eager forward, and formations are no generations."""
    reader, memory, inputs = tiny
    reader.backbone.model.set_attn_implementation("eager")
    plan = ((0, "long"), (4, "short"))
    with AttentionMeter(reader.model) as meter:
        output = reader.output(inputs, 8, memory=forced(plan), logits_processor=[WordsAndMemory()])
    assert len(meter.traces) == 1
    placed = memory.place(output.text, plan)
    steps = meter.trace.steps.tolist()
    # the prompt's last position, then everything that is fed one by one, then the end of each memory
    ends = [start + memory.sizes[kind] + 2 for start, (_, kind) in zip(placed.starts, plan, strict=True)]
    one_by_one = [at + 1 for at in (*placed.slots[:-1].tolist(), *placed.starts)]
    assert steps == sorted({0, *one_by_one, *ends})
    longer = reader.with_text(inputs, placed.ids)
    with splice(reader.model, longer["input_ids"], torch.cat([i.latents for i in output.invocations])), torch.no_grad():
        attentions = reader.model(**longer, use_cache=False, output_attentions=True).attentions
    latent = memory.tokens.latent_mask(longer["input_ids"])[0]
    prompt = inputs["input_ids"].shape[1]
    for row, step in enumerate(steps):
        for column, layer in enumerate(meter.layers):
            expected = attentions[layer][0, :, prompt + step - 1][:, latent].sum(-1)
            np.testing.assert_allclose(meter.trace.memory_mass[row, column, 0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["short", "long"])
def test_forming_attention_is_a_share(tiny: Any, kind: str) -> None:
    reader, memory, inputs = tiny
    [(formation, latents)] = memory.formed(reader, inputs, torch.arange(30, 36), ((4, kind),))
    formers = memory.branch.formers()
    found = watch_forming(formers, kind, formation)
    again = formers.form(kind, [formation])
    assert found is not None
    assert found.image.shape == (len(found.layers), memory.sizes[kind])
    assert (found.image > 0).all()
    assert (found.image < 1).all()
    if found.where is not None:
        np.testing.assert_allclose(found.where.sum(1), found.image.mean(0), atol=1e-5)
    torch.testing.assert_close(again, latents, rtol=0, atol=3e-5)


# -- on the reference VLM, with a long-term memory that was warmed up shortly --------------------------------------
@pytest.fixture
def warm(vismem_folder: Path) -> tuple[Any, Any]:
    return keepsight.load(vismem_folder, device="cpu")


def run(stage: Any) -> Any:
    for _ in stage.run():
        pass
    return stage.result()


def test_warm_memory_is_used_and_only_because_of_its_image(warm: tuple[Any, Any]) -> None:
    reader = Reader(*warm)
    memory = memory_of(reader.model)
    assert memory.trained == ("long",)
    result = run(Battery(reader, cases=DigitGrids(reader.processor).cases(6, 512)))
    assert result.verdict.word == "used", result.verdict.sentence
    assert result.formed == {"long": 6}
    conditions = {c.name: c for c in result.conditions}
    assert set(conditions) == {
        "off", "zeroed", "matched noise", "shuffled across samples", "other image", "scaled x0.5", "scaled x2",
        "other type",
    }  # fmt: skip
    assert conditions["other image"].score.high < 0
    swapped = next(h for h in result.half_way if h.name == "memory swapped")
    unchanged = next(h for h in result.half_way if h.name == "unchanged")
    assert swapped.follows.low > unchanged.follows.high


@pytest.mark.parametrize("references", [True, False])
def test_untrained_memory_is_not_used(warm: tuple[Any, Any], references: bool) -> None:
    model, processor = warm
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vismem_memory" in name and ".rows." not in name and "gain" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    reader = Reader(model, processor)
    cases = DigitGrids(processor).cases(6 if references else 5, 512 if references else 64)
    given: dict[str, Any] = {"cases": cases} if references else {"samples": [c.sample for c in cases], "steps": 24}
    result = run(Battery(reader, **given))
    assert result.verdict.word == "not used", result.verdict.sentence
    assert next(c for c in result.conditions if c.name == "off").logprob.value != 0, "it does change the output"


def test_probe_reads_the_warm_memory_and_not_shuffled_labels(warm: tuple[Any, Any]) -> None:
    reader = Reader(*warm)
    memory = memory_of(reader.model)
    _, long = run(Probe(reader, memory, images=192, task=DigitGrids.of(reader.processor)))
    assert long.trained
    assert not long.near_constant
    digits = long.facts[0]
    assert digits.is_read
    assert digits.latents.low > 0.4
    assert digits.shuffled.high < 0.2
    assert long.image_cosine > long.other_cosine + 0.1
    assert long.forming.image.mean() > long.forming.uniform
    assert len(long.words) == 16


def test_constant_latents_are_called_so(warm: tuple[Any, Any]) -> None:
    reader = Reader(*warm)
    same = torch.randn(1, 16, 96)
    with replace_latents(lambda kind, latents: same.expand_as(latents)):
        for probe in run(Probe(reader, memory_of(reader.model), images=96, task=DigitGrids.of(reader.processor))):
            assert probe.near_constant
            assert "near-constant" in probe.summary[0]
            assert not any(fact.is_read for fact in probe.facts)


def test_linear_probe_finds_what_is_planted() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (200, 3))
    planted = np.eye(4)[labels].reshape(200, -1) @ rng.normal(size=(12, 30)) + 0.1 * rng.normal(size=(200, 30))
    found = linear_probe(planted[:150], labels[:150], planted[150:], labels[150:])
    assert found.right.mean() > 0.95
    control = linear_probe(planted[:150], shuffled(labels[:150], 0), planted[150:], labels[150:])
    assert control.right.mean() < 0.45


def test_invocations_are_counted_where_they_are(warm: tuple[Any, Any]) -> None:
    reader = Reader(*warm)
    memory = memory_of(reader.model)
    assert memory.policy.name == "random"
    assert not memory.chooses
    case = DigitGrids(reader.processor).cases(1, 64)[0]
    samples = [Sample("describe", case.sample.images, dataset=name) for name in ("a", "b")]
    count = InvocationCount(reader, memory, samples, 60, temperature=1.0, exact=True)
    result = run(count)
    assert not result.chosen
    assert set(result.datasets) == {"a", "b"}
    total = sum(effect.memories for effect in result.effects.values())
    assert total == sum(len(formed) for _, _, formed in count._outputs) > 0
    for counted in result.datasets.values():
        assert counted.length == 60
        for kind, ratio in counted.ratio.items():
            assert len(ratio) == 10
            assert max(e.value for e in ratio) <= counted.any[kind].value
    by_output: dict[int, list[Any]] = {}
    for followed in result.followed:
        by_output.setdefault(followed.output, []).append(followed)
        assert followed.logprob is not None
    for rows in by_output.values():
        places = [row.memory.place for row in rows]
        assert [row.until for row in rows[:-1]] == np.diff(places).tolist()


def test_places_and_repetition() -> None:
    assert [tenth(place, 20) for place in (0, 1, 2, 19, 20)] == [0, 0, 1, 9, 9]
    assert tenth(0, 0) == 0
    assert repetition([1, 2, 3, 4] * 6, 12) == 1.0
    assert repetition(list(range(40)), 20) == 0.0
    assert repetition([1, 2, 3], 2) is None


@pytest.mark.parametrize("stage", ["writing", "invocations", "probing latents"])
def test_ctrl_c_keeps_what_was_measured(stage: str, warm: tuple[Any, Any], tmp_path: Path) -> None:
    from keepsight.diagnose import read_results
    from keepsight.diagnose.report import render_report

    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done >= (40 if stage == "writing" else 1):
            raise KeyboardInterrupt

    samples = [case.sample for case in DigitGrids(warm[1]).cases(2, 64)]
    settings = Settings(steps=48, causal_steps=16, probe_images=64)
    found = examine(*warm, samples, settings, progress=stop)
    assert found.interrupted
    assert found.written.memories
    assert len(found.written.slots) == len(found.written.words)
    assert (found.invocations is None) == (stage == "writing")
    assert bool(found.probes) == (stage == "probing latents")
    found.save(tmp_path / "results.json")
    assert "short" in render_report(found) or "long" in render_report(found)
    assert read_results(tmp_path / "results.json")["written"]["memories"]


def test_which_memory_is_the_users_choice(warm: tuple[Any, Any], reference: tuple[Any, Any]) -> None:
    assert memory_of(warm[0], "PVM") is None
    assert memory_of(warm[0], "VisMem", kind="short").kind == "short"
    with pytest.raises(KeepsightError, match="carries no VisMem"):
        examine(*reference, settings=Settings(memory="VisMem"))
    with pytest.raises(KeepsightError, match="'auto', 'short' or 'long'"):
        Settings(kind="both")  # type: ignore[arg-type]
