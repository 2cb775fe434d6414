"""One step of every stage of VisMem's training, on every family: warm start, stage I, stage II.

The pass with gradients must see the distribution that the trajectories were drawn from, however it reads the prompts:
whole sequences, with and without gradient checkpointing, or on from prompts that were read once.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import Row, make_inputs
from vismem_helpers import BY_NAME, EVERY, attach
from vismem_training import RANDOM, ROWS, rolled, seeds

from keepsight.backbone import Backbone
from keepsight.train.vismem.replay import Prefixes
from keepsight.train.vismem.rollout import Trajectory, sample
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings
from keepsight.train.vismem.stages import FormationStage, InvocationStage, Stage
from keepsight.train.vismem.update import checkpointing
from keepsight.train.vismem.warm_start import distill
from keepsight.vismem import MemoryPolicy

CLOSE = {"rtol": 0.0, "atol": 3e-5}
STEP: dict[str, Any] = {"max_steps": 1, "batch_size": 3, "group_size": 2, "device": "cpu"}


def has_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().max() > 0)


@pytest.mark.parametrize("name", [tiny.name for tiny in EVERY])
def test_a_step_of_every_stage(name: str) -> None:
    model = BY_NAME[name].build()
    prompts = [make_inputs(BY_NAME[name], model, [row]) for row in ROWS]
    together = make_inputs(BY_NAME[name], model, ROWS)
    model = attach(model, delimiter_ids=[7, 8, 9])
    report = distill(model, [together], steps=2)
    assert report.rows_without_image == 2
    model.eval()

    def passes(stage: Stage, found: list[Trajectory], drawn: torch.Tensor) -> None:
        prefixes = [Prefixes(model, prompts)] if Prefixes.can_read(model) else []
        for uses_checkpointing, once in ((False, None), (True, None), *((False, one) for one in prefixes)):
            model.zero_grad()
            with checkpointing(model, uses_checkpointing):
                seen = stage.log_probs(prompts, found, once)
                seen.sum().backward()
            torch.testing.assert_close(seen.detach(), drawn, **CLOSE)

    formation = FormationStage(model, FormationSettings(**STEP))
    found, drawn = rolled(model, prompts, RANDOM, copies=2)
    assert {i.kind for t in found for i in t.invocations} == {"short", "long"}
    passes(formation, found, drawn)
    without = [path for path, p in formation.trained().items() if not has_gradient(p)]
    assert [path for path in without if "layers.1.down.bias" not in path] == []
    assert torch.isfinite(formation.reference(prompts, found)).all()

    invocation = InvocationStage(model, InvocationSettings(**STEP, start_bias=3.0))
    found, drawn = rolled(model, prompts, MemoryPolicy("free", max_invocations=2), copies=2)
    assert any(t.invoked for t in found)
    passes(invocation, found, drawn)
    assert any(has_gradient(p) for p in invocation.trained().values())


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixtral", "mistral3"])
def test_pictures_of_other_sizes_share_a_batch(name: str) -> None:
    """A processor cuts the canvas of a lone picture to its size, so prompts differ in more than their length."""
    model = BY_NAME[name].build()
    prompts = []
    for row in (Row(3, (2, 2), 2, seed=1), Row(1, (1, 2), 5, seed=2)):
        inputs = make_inputs(BY_NAME[name], model, [row])
        height, width = inputs["image_sizes"][0].tolist()
        prompts.append(inputs | {"pixel_values": inputs["pixel_values"][..., :height, :width]})
    assert prompts[0]["pixel_values"].shape[-2:] != prompts[1]["pixel_values"].shape[-2:]
    model = attach(model, delimiter_ids=[7, 8, 9])
    together, _ = rolled(model, prompts, RANDOM, copies=2)
    alone = sample(model, prompts[1:], seeds(4)[2:], RANDOM, copies=2, max_words=14)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(together[2:], alone, strict=True))


def test_prompts_behind_sliding_windows_are_read_whole() -> None:
    """A cache with windows holds the end of a prompt only."""
    for name in ("gemma3", "qwen3_vl"):
        model = attach(BY_NAME[name].build())
        assert Prefixes.can_read(model) != Backbone.of(model).has_sliding_windows
