"""How to train: every knob, its default, and where the default comes from."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch

from keepsight.data.check import Policy
from keepsight.errors import KeepsightWarning
from keepsight.train.rewards.rewards import DEFAULT_REWARDS


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What supervised training and reinforcement learning have in common.

    Attributes:
        epochs: passes over the data. Ignored if `max_steps` is set.
        max_steps: optimiser steps.
        batch_size: samples (completions, in reinforcement learning) per device and forward.
        grad_accum: forwards per optimiser step.
        lr: peak learning rate of everything but the gates.
        gate_lr_multiplier: the gates' learning rate is this times `lr` (keepsight's own addition).
        warmup_ratio: share of the steps over which the learning rate rises.
        scheduler: name of a transformers schedule.
        weight_decay: of matrices; never of gates and norms.
        max_grad_norm: gradients are clipped to this norm.
        max_length: longest sample in tokens (of a prompt alone, in reinforcement learning); None for no limit.
        text_only: what to do with a sample without an image.
        bf16: autocast to bfloat16. None: on a GPU that has it.
        gradient_checkpointing: trade time for memory. None: on a GPU.
        dtype: of the base's weights; "auto" is the checkpoint's own (float32 where the language model is trained).
        load_in_4bit: hold the decoder's linear maps in four bits (see `keepsight.train.run.four_bit`; ours).
        device: "cpu" or "cuda"; None: the GPU if there is one.
        seed: of initialisation, data order and sampling.
        logging_steps, save_steps, eval_steps: how often to log, to save a checkpoint, and to evaluate
            (None: as often as saving).
        keep_checkpoints: how many checkpoints to keep; None keeps all.
        workers: processes that read images.
        report_to: trackers, e.g. ["tensorboard"].
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 1
    grad_accum: int = 8
    lr: float = 1e-4
    gate_lr_multiplier: float = 10.0
    warmup_ratio: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    text_only: Policy = "error"
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    device: str | None = None
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 200
    eval_steps: int | None = None
    keep_checkpoints: int | None = None
    workers: int = 0
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least 1.")
        for name in ("max_steps", "max_length", "eval_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1, or leave it out.")
        for name in ("epochs", "lr", "gate_lr_multiplier", "max_grad_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}: expected a share of the steps, from 0 to below 1.")
        if self.workers < 0 or self.weight_decay < 0:
            raise ValueError("workers and weight_decay cannot be negative.")

    @property
    def on_gpu(self) -> bool:
        """Whether training will run on a GPU."""
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.on_gpu if self.gradient_checkpointing is None else self.gradient_checkpointing

    @property
    def uses_bf16(self) -> bool:
        """Whether matrices are multiplied in bfloat16."""
        return (self.on_gpu and torch.cuda.is_bf16_supported()) if self.bf16 is None else self.bf16


@dataclass(frozen=True, kw_only=True)
class SftSettings(RunSettings):
    """How to fine-tune a memory. Defaults are the paper's first stage, where it names them.

    The paper's global batch is 64: 1 sample x 8 accumulation x 8 GPUs.

    Attributes:
        over_long: what to do with a sample longer than `max_length`.
        blindfold_steps: for so many first steps the frozen backbone's text cannot see the image (keepsight's own).
        blindfold_share: of the steps after these, this share is blindfolded too, so that the look-up stays needed.
            None: half of them, if there is a `blindfold_steps`, else none of them (the paper's recipe).
    """

    over_long: Literal["error", "skip", "truncate"] = "error"
    blindfold_steps: int = 0
    blindfold_share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blindfold_steps < 0:
            raise ValueError("blindfold_steps cannot be negative.")
        if self.blindfold_share is not None and not 0 <= self.blindfold_share < 1:
            raise ValueError(
                f"blindfold_share={self.blindfold_share}: expected a share of the steps, from 0 to below 1. With 1 the "
                "memory would never learn beside what the base sees itself."
            )
        _warn_without_length(self.over_long, self.max_length)


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(RunSettings):
    """How to refine a memory and its language model by GRPO. Defaults are the paper's second stage.

    A step reads `batch_size * grad_accum` completions per device, `completions` for each prompt. The paper's global
    batch is 64; the default is that on one device. Several devices share it: 8 x 1 x 8 GPUs.

    Attributes:
        completions: G, how many completions of a prompt are compared with each other.
        max_new_tokens: longest completion. (16,384 in the paper, prompt included.)
        temperature, top_p: of sampling.
        kl: coefficient of the divergence from the policy at the start; 0 in the paper, which needs no reference model.
        mask_truncated: completions that were cut off at `max_new_tokens` teach nothing.
        rollout_batch: how many completions a device writes at a time; fewer need less memory. None: all of a step.
        rewards: names, import paths and weights, see `keepsight.train.rewards.rewards.load_rewards`.
        over_long: what to do with a prompt longer than `max_length`.
    """

    batch_size: int = 8
    lr: float = 1e-6
    gate_lr_multiplier: float = 1.0
    warmup_ratio: float = 0.0
    scheduler: str = "constant"
    completions: int = 8
    max_new_tokens: int = 16_384
    temperature: float = 1.0
    top_p: float = 1.0
    kl: float = 0.0
    mask_truncated: bool = True
    rollout_batch: int | None = None
    rewards: tuple[str, ...] = DEFAULT_REWARDS
    over_long: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.completions < 2:
            raise ValueError(f"completions={self.completions}: GRPO compares at least 2 completions of a prompt.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: expected a whole number of at least 1.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}: expected a number above 0; GRPO needs differences.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share of the probability, above 0 and up to 1.")
        if not (self.kl >= 0 and math.isfinite(self.kl)):
            raise ValueError(f"kl={self.kl}: expected a coefficient of at least 0.")
        if self.rollout_batch is not None and (
            self.rollout_batch < 1
            or self.rollout_batch % self.batch_size
            or self.batch_size * self.grad_accum % self.rollout_batch
        ):
            raise ValueError(
                f"rollout_batch={self.rollout_batch}: expected a multiple of batch_size={self.batch_size} that divides "
                f"batch_size * grad_accum={self.batch_size * self.grad_accum}, so that every step writes its own "
                "completions."
            )
        _warn_without_length(self.over_long, self.max_length)

    @property
    def rollouts(self) -> int:
        """Completions that a device writes at a time."""
        return self.rollout_batch or self.batch_size * self.grad_accum


def _warn_without_length(over_long: str, max_length: int | None) -> None:
    if over_long != "error" and max_length is None:
        warnings.warn(
            f"over_long={over_long!r} has no effect without max_length: no sample is too long.",
            KeepsightWarning,
            stacklevel=4,
        )
