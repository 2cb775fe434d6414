"""What runs cost: operations by shape against what torch itself counts, and sums over resumes and stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, Row, make_inputs
from helpers import torch_counts_attention
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import keepsight
from keepsight.train.run.accounting import CostMeter, RunCost, markdown, read_costs
from keepsight.train.run.flops import ModelShape

ROWS = [Row(3, (2, 3), 90, seed=1), Row(3, (2, 3), 90, seed=2)]


def counted(model: Any, inputs: dict[str, torch.Tensor], backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = model(**inputs, use_cache=False).logits.float().pow(2).mean()
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl_qwen2", "llava_onevision"])
def test_operations_are_about_those_that_torch_counts(name: str) -> None:
    family = BY_NAME[name]
    model: Any = get_peft_model(family.build(), keepsight.PvmConfig(layers=[1, 3], width=32))
    inputs = make_inputs(family, model, ROWS)
    rows, length = inputs["input_ids"].shape
    if not torch_counts_attention():
        pytest.skip("this torch does not count attention on CPUs")
    for trained in ("memory", "all"):
        if trained == "all":
            model.requires_grad_(True)
        shape = ModelShape.of(model)
        shape = replace(shape, attention=2 * shape.attention)  # torch counts the half that causality leaves out, too
        patches = shape.patches(inputs)
        assert shape.forward(rows, length, patches) == pytest.approx(counted(model, inputs, False), rel=0.15)
        assert shape.train(rows, length, patches) == pytest.approx(counted(model, inputs, True), rel=0.2)


def test_of_a_mixture_only_the_visited_experts_count() -> None:
    dense, mixed = (ModelShape.of(BY_NAME[name].build()) for name in ("qwen3_vl", "qwen3_vl_moe"))
    model = BY_NAME["qwen3_vl_moe"].build()
    everything = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.dim() > 1)
    assert mixed.text < everything < 2 * dense.text
    assert dense.trained_depth == 1.0
    model.requires_grad_(False)
    frozen = ModelShape.of(model)
    assert (frozen.trained_depth, frozen.trained_text, frozen.trained_vision) == (0.0, 0, 0)


def meter(folder: Path, **options: Any) -> CostMeter:
    return CostMeter(folder, "a run", ModelShape.of(BY_NAME["qwen3_vl"].build()), 7, processes=2, **options)


def test_resumed_runs_go_on_counting(tmp_path: Path) -> None:
    first = meter(tmp_path)
    first.trained(2, 50, tokens=80)
    first.generated(4, 20, 10, tokens=33)
    first.steps = 3
    cost = first.write()
    assert (cost.tokens_trained, cost.tokens_generated, cost.steps, cost.sessions) == (160, 66, 3, 1)
    assert cost.flops == 2 * (first.shape.train(2, 50) + first.shape.forward(4, 30))
    assert cost.peak_memory > 2**20
    assert RunCost.read(tmp_path) == cost

    second = meter(tmp_path, resume=True)
    second.trained(2, 50, tokens=80)
    more = second.write()
    assert (more.tokens_trained, more.tokens_generated, more.steps, more.sessions) == (320, 66, 3, 2)
    assert more.seconds >= cost.seconds
    assert meter(tmp_path).cost.tokens_trained == 0  # without resume, from nothing


def test_stages_are_summed_and_compared(tmp_path: Path) -> None:
    for name, flops in (("sft", 2e15), ("one", 3e15), ("two", 5e15)):
        (tmp_path / name).mkdir()
        RunCost(name=name, flops=flops, seconds=100, peak_memory=int(flops / 1e6)).write(tmp_path / name)
    runs = [tmp_path / "sft", f"two RL stages={tmp_path / 'one'}+{tmp_path / 'two'}"]
    both = read_costs(runs)[1]
    assert (both.name, both.flops, both.seconds, both.peak_memory) == ("two RL stages", 8e15, 200, int(5e9))
    lines = markdown(runs).splitlines()
    assert lines[2].startswith("| sft | 2 | 1.00 x |")
    assert lines[3].startswith("| two RL stages | 8 | 4.00 x |")
    with pytest.raises(FileNotFoundError, match=r"has no cost\.json"):
        read_costs([tmp_path])
