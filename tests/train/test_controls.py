"""Controls: the same run without the memory, at equal size, beside it in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TinyFamily
from safetensors.torch import load_file
from tiny_training import QUICK

import keepsight
from keepsight.backbone import Backbone
from keepsight.data.check import check_dataset, load_dataset_any
from keepsight.errors import KeepsightError
from keepsight.train.pvm.sft import SftSettings, train_pvm
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import Control, hold_out, parse_controls
from keepsight.train.run.learner import lora_size, matched_lora, ranked_lora

ALL = ["lora,mlp", "sft=1e-3", "none"]


def settings(**changes: Any) -> SftSettings:
    return SftSettings(**(QUICK | changes))


def test_every_control_runs_beside_the_memory(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = train_pvm(
        tiny_vlm,
        data,
        out,
        pvm=keepsight.PvmConfig(layers=[1, 3], width=32),
        eval_dataset=data,
        settings=settings(max_steps=6),
        controls=parse_controls(ALL),
    )
    outcomes = {one.name: one for one in report.comparison.outcomes}
    assert list(outcomes) == ["pvm", "lora", "mlp", "sft", "none"]
    memory = outcomes["pvm"].parameters
    assert memory == report.trainable
    assert outcomes["lora"].parameters == pytest.approx(memory, rel=0.01)
    assert outcomes["mlp"].parameters == pytest.approx(memory, rel=0.01)
    assert outcomes["sft"].parameters > 2 * memory
    assert outcomes["none"].parameters == outcomes["none"].steps == 0
    base_loss = outcomes["none"].metrics["eval_loss"]
    for name in ("pvm", "lora", "mlp", "sft"):
        one = outcomes[name]
        assert one.steps == 6
        assert one.metrics["eval_loss"] < base_loss
        assert one.cost == RunCost.read(one.folder)
        assert one.cost.tokens_trained == outcomes["pvm"].cost.tokens_trained  # the same data in the same order
    assert outcomes["sft"].cost.flops > outcomes["pvm"].cost.flops > outcomes["none"].cost.flops > 0
    assert outcomes["sft"].lr == 1e-3

    told = json.loads((out / "comparison.json").read_text())
    assert [one["folder"] for one in told["outcomes"][1:4]] == ["control-lora", "control-mlp", "control-sft"]
    table = (out / "comparison.md").read_text()
    assert f"{memory:,}" in table
    assert f"{outcomes['lora'].parameters:,}" in table
    assert "the evaluation data" in table

    # Every control is a model that loads; only what it names was trained.
    base, _ = keepsight.load(tiny_vlm)
    for name in ("lora", "mlp", "sft"):
        model, _ = keepsight.load(out / f"control-{name}")
        assert isinstance(model, type(base)) == (name == "sft")
    vision = {n: t for n, t in base.state_dict().items() if ".visual." in n}
    tuned, _ = keepsight.load(out / "control-sft")
    assert vision
    assert all(torch.equal(tensor, tuned.state_dict()[name]) for name, tensor in vision.items())
    assert any(not torch.equal(tensor, tuned.state_dict()[name]) for name, tensor in base.state_dict().items())


def test_a_resumed_comparison_is_the_unbroken_one(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"settings": settings(max_steps=6, save_steps=3), "controls": (Control("lora"),)}
    whole = train_pvm(tiny_vlm, data, tmp_path / "whole", **options)
    # As if a kill had come in the middle of the control.
    broken = tmp_path / "broken"
    train_pvm(tiny_vlm, data, broken, **options)
    (broken / "comparison.json").unlink()
    for name in ("adapter_model.safetensors", "adapter_config.json", "checkpoint-6/trainer_state.json"):
        (broken / "control-lora" / name).unlink()
    again = train_pvm(tiny_vlm, data, broken, **options, resume=True)
    first, second = (load_file(r / "control-lora" / "adapter_model.safetensors") for r in (tmp_path / "whole", broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    a, b = (report.comparison.outcomes[1] for report in (whole, again))
    assert (a.metrics, a.last_loss) == (b.metrics, b.last_loss)
    assert "held out" in again.comparison.note


def test_a_matched_lora_has_the_memorys_size(family: TinyFamily) -> None:
    from peft import get_peft_model

    model = family.build()
    for parameters in (20_000, 33_333):
        lora, said = matched_lora(Backbone.of(model), parameters)
        assert said == lora_size(Backbone.of(model), lora)
        wrapped: Any = get_peft_model(family.build(), lora)  # PEFT rewrites the config's names
        assert said == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert 0 <= parameters - said < 200
        assert not any(".visual." in n or "vision" in n for n, p in wrapped.named_parameters() if p.requires_grad)
    lora, said = ranked_lora(Backbone.of(model), 2)
    assert said == lora_size(Backbone.of(model), lora)
    with pytest.raises(KeepsightError, match="No LoRA has as few as 3 parameters"):
        matched_lora(Backbone.of(model), 3)


def test_samples_are_held_out_evenly_and_always_the_same(data: Path) -> None:
    checked = check_dataset(load_dataset_any(data))
    train, held_out = hold_out(checked)
    assert held_out is not None
    assert (train.rows, held_out.rows) == (15, 1)
    assert len(train.dataset) + len(held_out.dataset) == 16
    assert hold_out(checked)[1].dataset[0] == held_out.dataset[0]
    few = hold_out(train)[0]
    assert hold_out(few.select([0, 1, 2, 3, 4]))[1] is None


@pytest.mark.parametrize(
    ("text", "lesson"),
    [
        ("banana", "expected lora, mlp, sft or none"),
        ("sft=fast", "'fast' is no learning rate"),
        ("sft=-1", "no learning rate"),
        ("lora,lora", "names lora twice"),
        ("none=1e-4", "trains nothing"),
    ],
)
def test_what_is_no_control(text: str, lesson: str) -> None:
    with pytest.raises(KeepsightError, match=lesson):
        parse_controls([text])
