"""Dry runs: what is traced on shapes is what a real step does, and estimates follow settings and engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, TinyFamily

import keepsight
from keepsight.backbone import Backbone
from keepsight.pvm.branch import MEMORY
from keepsight.train.estimate.dry_run import dry_run
from keepsight.train.estimate.needs import GIB
from keepsight.train.estimate.tracing import SeenImage, trace
from keepsight.train.run.engines import Engine
from keepsight.train.run.learner import Learner, ranked_lora
from keepsight.train.run.settings import GrpoSettings, SftSettings

PVM = keepsight.PvmConfig(layers=[1, 3], width=32)


def on_meta(family: TinyFamily, learner: Learner, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return learner.put_on(family.build().to(dtype), 0)


def really_kept(model: Any, rows: int, length: int, visual: int) -> int:
    """Bytes that a real forward of the decoder keeps for the backward, weights and squares of attention left out."""
    backbone = Backbone.of(model)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        square = tensor.dim() >= 3 and tensor.shape[-2] == length and tensor.shape[-1] in (length, visual)
        if storage.data_ptr() not in weights and not square:
            kept[storage.data_ptr()] = storage
        return tensor

    width = backbone.text_config.hidden_size
    memory = SeenImage(torch.randn(rows, visual, width))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeds = torch.randn(rows, length, width)
        backbone.decoder(inputs_embeds=embeds, use_cache=False, **{MEMORY: memory})
    return sum(storage.nbytes() for storage in kept.values())


def test_the_trace_reaches_everything_that_learns(family: TinyFamily) -> None:
    found = trace(on_meta(family, Learner(memory=PVM), torch.bfloat16), 2, 24, 8)
    assert found.untrained == ()
    assert 0 < found.checkpointed < found.kept


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_the_trace_reaches_a_policy(policy: Any) -> None:
    family = BY_NAME["qwen3_vl"]
    lora, _ = ranked_lora(Backbone.of(family.build()), 2)
    assert trace(on_meta(family, Learner(memory=PVM, policy=policy, lora=lora)), 2, 24, 8).untrained == ()


def test_a_tensor_without_a_gradient_is_named() -> None:
    model = on_meta(BY_NAME["qwen3_vl"], Learner(memory=PVM))
    next(iter(Backbone.of(model).vision_tower.parameters())).requires_grad_(True)
    (name,) = trace(model, 1, 40, 8).untrained
    assert "vis" in name


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl_qwen2"])
def test_as_much_is_kept_as_in_a_real_step(name: str) -> None:
    family, learner = BY_NAME[name], Learner(memory=PVM)
    real = really_kept(learner.put_on(family.build(), 0), 2, 60, 16)
    assert trace(on_meta(family, learner), 2, 60, 16).kept == pytest.approx(real, rel=0.15)


def test_a_dry_run_is_of_a_gpu_unless_a_cpu_is_asked_for(tiny_vlm: Path) -> None:
    def found(**settings: Any) -> Any:
        return dry_run(tiny_vlm, Learner(memory=PVM), SftSettings(**settings), length=100, engine=Engine())

    assumed, said = found(), found(bf16=True, gradient_checkpointing=True)
    assert assumed.need == said.need
    assert assumed.need.activations == assumed.need.activations_checkpointed
    assert found(gradient_checkpointing=False).need.activations == assumed.need.activations_plain
    cpu = found(device="cpu")
    assert cpu.need.activations == cpu.need.activations_plain > assumed.need.activations_plain  # float32
    assert dict(assumed.rows_of_table())["fits"].startswith("24 GB: yes, 0.0 GiB; 40 GB: yes; 48 GB: yes; 80 GB: yes")
    assert "fits" not in dict(cpu.rows_of_table())


@pytest.mark.parametrize(
    ("gib", "answers"),
    [
        (17.7, "24 GB: yes, 17.7 GiB; 40 GB: yes; 48 GB: yes; 80 GB: yes"),
        (21, "24 GB: barely, 21.0 GiB; 40 GB: yes; 48 GB: yes; 80 GB: yes"),
        (60, "24 GB: no, 60.0 GiB; 40 GB: no; 48 GB: no; 80 GB: yes"),
        (90, "24 GB: no, 90.0 GiB; 40 GB: no; 48 GB: no; 80 GB: no"),
    ],
)
def test_it_says_which_gpus_hold_the_run(tiny_vlm: Path, gib: float, answers: str) -> None:
    found = dry_run(tiny_vlm, Learner(memory=PVM), SftSettings(), length=100, engine=Engine())
    need = replace(found.need, weights=round(gib * GIB) - found.need.total + found.need.weights)
    assert replace(found, need=need).fits() == answers


def test_eager_attention_keeps_its_squares(tiny_vlm: Path) -> None:
    kept = {
        name: dry_run(
            tiny_vlm, Learner(memory=PVM), SftSettings(attention=name), length=400, engine=Engine()
        ).need.activations_plain
        for name in ("sdpa", "eager")
    }
    assert kept["eager"] > kept["sdpa"] + 4 * 400 * 400 * 2  # a head's square in bfloat16, in four layers


def test_estimates_follow_settings_and_engines(tiny_vlm: Path) -> None:
    def need(engine: Engine, settings: Any = None, learner: Learner | None = None) -> Any:
        chosen = settings or SftSettings(device="cpu")
        return dry_run(tiny_vlm, learner or Learner(memory=PVM), chosen, length=100, engine=engine)

    one = need(Engine())
    assert one.tokens_per_step == 800
    assert one.need.gradients == 4 * one.trained
    assert one.need.optimiser == 8 * one.trained
    assert one.need.weights == 4 * one.total  # stored in float32
    assert one.need.total == one.need.weights + 12 * one.trained + one.need.activations_plain
    checkpointing = need(Engine(), SftSettings(device="cpu", gradient_checkpointing=True))
    assert checkpointing.need.activations == one.need.activations_checkpointed < one.need.activations_plain
    assert checkpointing.flops_per_step > one.flops_per_step

    ddp, sharded = need(Engine("ddp", 4, 0)), need(Engine("fsdp2", 4, 0))
    assert ddp.need == one.need
    assert ddp.flops_per_step == 4 * one.flops_per_step
    assert sharded.need.weights == pytest.approx(one.need.weights / 4, abs=4)
    assert sharded.need.optimiser == one.need.optimiser // 4

    grpo = GrpoSettings(device="cpu", max_new_tokens=50, rows_per_rollout=8)
    rollouts = need(Engine(), grpo, Learner(memory=PVM, policy="full"))
    assert rollouts.length == 150
    assert rollouts.generated == 50
    more = need(Engine(), GrpoSettings(device="cpu", max_new_tokens=50), Learner(memory=PVM, policy="full"))
    assert more.need.cache == 8 * rollouts.need.cache > 0
    assert rollouts.trained > one.trained
