"""How to fine-tune a memory: every knob, its default, and where the default comes from."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch

from keepsight.errors import KeepsightWarning
from keepsight.train.data import Policy


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """How to train. Defaults are the paper's where it names them.

    Attributes:
        epochs: passes over the data. Ignored if `max_steps` is set.
        max_steps: optimiser steps.
        batch_size: samples per device and forward.
        grad_accum: forwards per optimiser step. The paper's global batch is 64 = 1 x 8 accumulation x 8 GPUs.
        lr: peak learning rate of everything but the gates.
        gate_lr_multiplier: the gates' learning rate is this times `lr` (keepsight's own addition).
        warmup_ratio: share of the steps over which the learning rate rises.
        scheduler: name of a transformers schedule.
        weight_decay: of matrices; never of gates and norms.
        max_grad_norm: gradients are clipped to this norm.
        max_length: longest sample in tokens; None for no limit.
        over_long: what to do with a longer one.
        text_only: what to do with a sample without an image.
        blindfold_steps: for so many first steps the frozen backbone's text cannot see the image (keepsight's own).
        bf16: autocast to bfloat16. None: on a GPU that has it.
        gradient_checkpointing: trade time for memory. None: on a GPU.
        dtype: of the base's weights; "auto" is the checkpoint's own.
        device: "cpu" or "cuda"; None: the GPU if there is one.
        seed: of initialisation and data order.
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
    over_long: Literal["error", "skip", "truncate"] = "error"
    text_only: Policy = "error"
    blindfold_steps: int = 0
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    dtype: str = "auto"
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
        if self.blindfold_steps < 0 or self.workers < 0 or self.weight_decay < 0:
            raise ValueError("blindfold_steps, workers and weight_decay cannot be negative.")
        if self.over_long != "error" and self.max_length is None:
            warnings.warn(
                f"over_long={self.over_long!r} has no effect without max_length: no sample is too long.",
                KeepsightWarning,
                stacklevel=3,
            )

    @property
    def on_gpu(self) -> bool:
        """Whether training will run on a GPU."""
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def checkpoints_gradients(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.on_gpu if self.gradient_checkpointing is None else self.gradient_checkpointing
