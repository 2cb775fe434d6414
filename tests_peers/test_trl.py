"""TRL's cases for VLMs, written anew, as its source distribution holds no tests: stock trainers, nothing of ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import keepsight
from keepsight.errors import KeepsightError
from keepsight.lab.samples import example_images

ROWS = 4


def loaded(memory: str) -> tuple[Any, Any]:
    """The built-in VLM with a fresh memory (or a LoRA, or nothing)."""
    model, processor = keepsight.load("keepsight/reference")
    configs = {
        "pvm": keepsight.PvmConfig(layers=[1, 3], width=32, init_gate=0.1),
        "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }
    return (get_peft_model(model, configs[memory]) if memory in configs else model), processor


def conversations(vision: bool = True) -> Dataset:
    """Rows as TRL takes them."""
    rows = []
    for image, digits in example_images(ROWS, 0):
        content = [{"type": "text", "text": "describe"}]
        if vision:
            content.insert(0, {"type": "image"})
        answer = [{"type": "text", "text": f"a1 {digits[0]} . b1 {digits[1]} ."}]
        row = {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        rows.append(row | ({"images": [image]} if vision else {}))
    return Dataset.from_list(rows)


def trained(trainer: Any) -> tuple[set[str], set[str]]:
    """Train; names of the parameters that changed, and of those that could have."""
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    return changed, {name for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("memory", ["plain", "lora", "pvm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(memory: str, checkpointing: bool, tmp_path: Path) -> None:
    """What can be trained changes, and nothing else does."""
    model, processor = loaded(memory)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        max_length=None,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        bf16=False,
    )
    changed, could = trained(
        SFTTrainer(model=model, args=arguments, train_dataset=conversations(), processing_class=processor)
    )
    assert changed <= could
    if memory == "pvm":
        assert changed == could
        assert all("pvm_" in name for name in changed)
    assert changed


@pytest.mark.parametrize("memory", ["lora", "pvm"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo(memory: str, beta: float, tmp_path: Path) -> None:
    """Prompts with images, groups of two, with and without a reference."""
    model, processor = loaded(memory)
    rows = conversations().remove_columns("completion")
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-2,
        beta=beta,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )

    def reward(completions: Any, **columns: Any) -> list[float]:
        return [float(n % 2) for n in range(len(completions))]

    changed, could = trained(
        GRPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor, reward_funcs=reward)
    )
    assert changed
    assert changed <= could
    if memory == "pvm":
        assert all("pvm_" in name for name in changed)


@pytest.mark.parametrize("trainer", ["sft", "grpo"])
def test_an_active_vismem_is_refused_by_name(trainer: str, tmp_path: Path) -> None:
    """Both trainers compute past the model's head, where its special tokens have no logits."""
    model, processor = keepsight.load("keepsight/reference-vismem")
    model.base_model.enable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vismem_" in name)
    options: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
    }
    if trainer == "sft":
        arguments = SFTConfig(**options, max_length=None, per_device_train_batch_size=2)
        made: Any = SFTTrainer(model=model, args=arguments, train_dataset=conversations(), processing_class=processor)
    else:
        grpo = GRPOConfig(**options, per_device_train_batch_size=2, num_generations=2, max_completion_length=4)
        rows = conversations().remove_columns("completion")
        made = GRPOTrainer(
            model=model,
            args=grpo,
            train_dataset=rows,
            processing_class=processor,
            reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        )
    with pytest.raises(KeepsightError, match="vismem-formation"):
        made.train()
