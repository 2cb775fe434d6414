"""Settings of training: default and meaning of each, from which the options of the command line are made."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.attention import Attention, kernel_named
from keepsight.errors import KeepsightWarning
from keepsight.train.rewards import DEFAULT_REWARDS
from keepsight.train.run.fields import DATA, MEMORY, REWARD, RUN, STEPS, documented, setting

REWARDS_HELP = (
    "format, answer, match, or package.module:function, with =WEIGHT behind it; repeat for several. Default: "
    "format (0.1) and answer (0.9)."
)
FOUR_BIT_HELP = (
    "Hold the base's linear maps in four bits (NF4, bitsandbytes): a third of the memory, slower; not in the papers."
)
ATTENTION_HELP = "Attention kernel. Default: transformers' choice, sdpa. The PVM paper's is flash_attention_2."
TRACKERS_HELP = "tensorboard, wandb, trackio, ...; repeat for several."
PAPER_SFT: dict[str, Any] = {"blindfold_steps": 0, "gate_lr_multiplier": 1.0}
"""What the PVM paper's first stage has otherwise than our defaults."""


@documented
@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """What every way of training has."""

    epochs: float = setting(1.0, "Passes over the data.", STEPS)
    max_steps: int | None = setting(None, "Optimiser steps; overrides --epochs.", STEPS)
    batch_size: int = setting(1, "Samples per device and forward.", STEPS)
    lr: float = setting(1e-4, "Peak learning rate.", STEPS)
    warmup_ratio: float = setting(0.1, "Share of the steps with a rising rate.", STEPS)
    scheduler: str = setting("cosine", "cosine, linear, constant, ...", STEPS)
    weight_decay: float = setting(0.0, "Of matrices.", STEPS)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to it.", STEPS)
    gradient_checkpointing: bool | None = setting(None, "Less memory, more time. Default: on a GPU.", RUN)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "Of the base.", RUN)
    attention: Attention | None = setting(None, ATTENTION_HELP, RUN)
    load_in_4bit: bool = setting(False, FOUR_BIT_HELP, RUN, "--load-in-4bit")
    device: Literal["cpu", "cuda"] | None = setting(None, "Default: the GPU if there is one.", RUN)
    seed: int = setting(0, "Of initialisation, data order and sampling.", STEPS)
    logging_steps: int = setting(10, "A line every so many steps.", RUN)
    save_steps: int = setting(200, "A checkpoint every so many steps.", RUN)
    keep_checkpoints: int | None = setting(None, "How many checkpoints to keep. Default: all.", RUN)
    report_to: tuple[str, ...] = setting((), TRACKERS_HELP, RUN)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", kernel_named(self.attention))
        self._whole("batch_size", "logging_steps", "save_steps", "max_steps", "keep_checkpoints")
        self._positive("epochs", "lr", "max_grad_norm")
        self._not_negative("weight_decay")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}: expected a share of the steps, from 0 to below 1.")

    @property
    def on_gpu(self) -> bool:
        """Whether training will run on a GPU."""
        import torch

        return self.device != "cpu" and torch.cuda.is_available()

    def _whole(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                optional = next(item.default for item in fields(self) if item.name == name) is None
                more = ", or leave it out" if optional else ""
                raise ValueError(f"{name}={value}: expected a whole number of at least 1{more}.")

    def _positive(self, *names: str) -> None:
        for name in names:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0.")

    def _not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value}: expected a number of at least 0.")


@documented
@dataclass(frozen=True, kw_only=True)
class RunSettings(CommonSettings):
    """What PVM's supervised training and reinforcement learning have in common."""

    grad_accum: int = setting(8, "Forwards per step.", STEPS)
    gate_lr_multiplier: float = setting(10.0, "The gates learn so many times faster. Not in the paper.", STEPS)
    max_length: int | None = setting(
        None,
        "Longest sample in tokens, images included. Default: no limit.",
        DATA,
    )
    text_only: Literal["error", "skip", "keep"] = setting(
        "error", "What to do with samples without an image: they teach a memory nothing.", DATA
    )
    bf16: bool | None = setting(None, "Default: on a GPU that has it.", RUN)
    eval_steps: int | None = setting(None, "Evaluate every so many steps. Default: as --save-steps.", RUN)
    workers: int = setting(0, "Processes that read images.", RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("grad_accum", "max_length", "eval_steps")
        self._positive("gate_lr_multiplier")
        self._not_negative("workers")

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.on_gpu if self.gradient_checkpointing is None else self.gradient_checkpointing

    @property
    def uses_bf16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        import torch

        return (self.on_gpu and torch.cuda.is_bf16_supported()) if self.bf16 is None else self.bf16


@documented
@dataclass(frozen=True, kw_only=True)
class SftSettings(RunSettings):
    """How to fine-tune a memory.

    Defaults are the paper's first stage with two additions of ours: gates that learn faster, and the blindfold warm-up,
    without which the memory's look-up did not form in our laboratory. `SftSettings.paper()` is without them. The
    paper's global batch is 64: 1 sample x 8 accumulation x 8 GPUs.
    """

    over_long: Literal["error", "skip", "truncate"] = setting(
        "error", "What to do with longer ones. truncate cuts answers, never images.", DATA
    )
    blindfold_steps: int | None = setting(
        None,
        "For so many first steps the frozen base cannot see the image, so the memory must. 0 for none. Default: three "
        "eighths of the steps, where the base can be blindfolded. Not in the paper.",
        MEMORY,
    )
    blindfold_share: float | None = setting(
        None,
        "The share of the later steps that is blindfolded too, so that the look-up is not lost again. Default: 0.5; 0 "
        "with --blindfold-steps 0. Not in the paper.",
        MEMORY,
    )
    keep_language: str | None = setting(
        None,
        "A file of texts (plain, or .jsonl with text). Behind an image, what is expected of them is held to what the "
        "base expects. For short answers, which teach a memory nothing about texts. Not in the paper.",
        MEMORY,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blindfold_steps is not None and self.blindfold_steps < 0:
            raise ValueError(f"blindfold_steps={self.blindfold_steps}: expected 0 (no warm-up) or more.")
        if self.blindfold_share is not None and not 0 <= self.blindfold_share < 1:
            raise ValueError(
                f"blindfold_share={self.blindfold_share}: expected a share of the steps, from 0 to below 1. With 1 the "
                "memory would never learn beside what the base sees itself."
            )
        if self.keep_language is not None:
            object.__setattr__(self, "keep_language", str(Path(self.keep_language).expanduser()))
        _warn_without_length(self.over_long, self.max_length)

    @classmethod
    def paper(cls, **changes: Any) -> SftSettings:
        """The paper's first stage as published; its memory is `PvmConfig(causal=False)`."""
        return cls(**{**PAPER_SFT, **changes})

    @property
    def asks_for_blindfold(self) -> bool:
        """Whether the blindfold was asked for, and is not there by default."""
        return bool(self.blindfold_steps or self.blindfold_share)


@documented
@dataclass(frozen=True, kw_only=True)
class GrpoSettings(RunSettings):
    """How to refine a memory and its language model by GRPO. Defaults are the paper's second stage.

    A step reads `batch_size * grad_accum` completions per device, `group_size` for each prompt. The paper's global
    batch is 64; the default is that on one device. Several devices share it: 8 x 1 x 8 GPUs. The paper's completions
    have at most 16,384 tokens, the prompt included.
    """

    batch_size: int = setting(8, "Completions per device and forward.", STEPS)
    lr: float = setting(1e-6, "Peak learning rate.", STEPS)
    gate_lr_multiplier: float = setting(1.0, "The gates learn so many times faster. Not in the paper.", STEPS)
    warmup_ratio: float = setting(0.0, "Share of the steps with a rising rate.", STEPS)
    scheduler: str = setting("constant", "cosine, linear, constant, ...", STEPS)
    max_length: int | None = setting(
        None,
        "Longest prompt in tokens, images included. Default: no limit.",
        DATA,
    )
    logging_steps: int = setting(1, "A line every so many steps.", RUN)
    save_steps: int = setting(50, "A checkpoint every so many steps.", RUN)
    group_size: int = setting(
        8,
        "G, completions of each prompt, compared with each other.",
        REWARD,
    )
    max_new_tokens: int = setting(16_384, "Longest completion in tokens.", REWARD)
    temperature: float = setting(1.0, "Of sampling.", REWARD)
    top_p: float = setting(1.0, "Of sampling.", REWARD)
    kl: float = setting(0.0, "Coefficient of the divergence from the start.", REWARD)
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = setting(
        "dapo",
        "How tokens' losses are averaged, as TRL names it: dapo over all tokens of a step, grpo within each completion "
        "first. The paper says GRPO and no more.",
        REWARD,
    )
    clip: float = setting(0.2, "How far the ratio may move. Not given in the paper.", REWARD)
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "Advantages are divided by the rewards' deviation: of a question's group, of the batch, not.", REWARD
    )
    mask_truncated: bool = setting(True, "Completions that were cut off teach nothing.", REWARD)
    rows_per_rollout: int | None = setting(
        None, "Completions a device writes at a time. Default: all of a step.", REWARD
    )
    rewards: tuple[str, ...] = setting(DEFAULT_REWARDS, REWARDS_HELP, REWARD, "--reward")
    over_long: Literal["error", "skip"] = setting("error", "What to do with longer ones.", DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size}: GRPO compares at least 2 completions of a prompt.")
        self._whole("max_new_tokens")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}: expected a number above 0; GRPO needs differences.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share of the probability, above 0 and up to 1.")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip={self.clip}: expected how far the ratio may move from 1, above 0 and below 1.")
        if not (self.kl >= 0 and math.isfinite(self.kl)):
            raise ValueError(f"kl={self.kl}: expected a coefficient of at least 0.")
        if self.rows_per_rollout is not None and (
            self.rows_per_rollout < 1
            or self.rows_per_rollout % self.batch_size
            or self.batch_size * self.grad_accum % self.rows_per_rollout
        ):
            raise ValueError(
                f"rows_per_rollout={self.rows_per_rollout}: expected a multiple of batch_size={self.batch_size} that "
                f"divides batch_size * grad_accum={self.batch_size * self.grad_accum}, so that every step writes its "
                "own completions."
            )
        _warn_without_length(self.over_long, self.max_length)

    @property
    def rollouts(self) -> int:
        """Completions that a device writes at a time."""
        return self.rows_per_rollout or self.batch_size * self.grad_accum


def _warn_without_length(over_long: str, max_length: int | None) -> None:
    if over_long != "error" and max_length is None:
        warnings.warn(
            f"over_long={over_long!r} has no effect without max_length: no sample is too long.",
            KeepsightWarning,
            stacklevel=4,
        )
