"""How to train a latent vision memory: every knob of the two stages, its default, and where the default comes from."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch

from keepsight.errors import KeepsightError, KeepsightWarning

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class RlSettings:
    """What both stages share. Defaults are the paper's where it names them; "ours" marks what it does not.

    Attributes:
        epochs: passes over the prompts. Ignored if `max_steps` is set.
        max_steps: optimiser steps.
        batch_size: prompts per step, all processes together.
        group_size: G, trajectories per prompt.
        iterations: optimiser steps per batch of trajectories.
        lr: peak learning rate (AdamW).
        end_lr: of the rows of the end tokens; None: a tenth of `lr` (the paper says "lower").
        warmup_ratio: share of the steps over which the learning rate rises.
        scheduler: "cosine", "linear" or "constant".
        weight_decay: of everything that is trained.
        max_grad_norm: gradients are clipped to this norm (ours).
        clip: of the ratio.
        kl: coefficient of the KL penalty.
        target_kl: KL per token above which the coefficient of the next step grows in proportion (the paper gives the
            number and no rule); None: the coefficient stays.
        gain: what is rewarded: "replay" is the paper's dS, score minus the score of the same beginning continued
            without memory; "score" saves those rollouts (ours).
        max_words: longest completion, in tokens of text; memories do not count.
        temperature: of sampling.
        max_invocations: at most so many per trajectory; None: the memory's own setting.
        rows_per_rollout: trajectories written at once by one process.
        rows_per_forward: trajectories in one forward and backward; changes memory and speed, not the result.
        gradient_checkpointing: trade time for memory. None: on a GPU, but not where an incremental memory is formed,
            whose kept keys and values cannot be computed twice.
        dtype: of the base's weights; "auto" is the checkpoint's own. The memory is always trained in float32.
        load_in_4bit: hold the decoder's linear maps in four bits (see `keepsight.train.run.four_bit`; ours).
        device: "cpu" or "cuda"; None: the GPU if there is one.
        seed: of initialisation, order of prompts, and sampling.
        logging_steps, save_steps: how often to log and to save a checkpoint.
        keep_checkpoints: how many checkpoints to keep; None keeps all.
        report_to: trackers, e.g. ["tensorboard"].
    """

    epochs: float = 2.0
    max_steps: int | None = None
    batch_size: int = 8
    group_size: int = 16
    iterations: int = 1
    lr: float = 5e-5
    end_lr: float | None = None
    warmup_ratio: float = 0.2
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 0.2
    kl: float = 0.015
    target_kl: float | None = 0.03
    gain: Literal["replay", "score"] = "replay"
    max_words: int = 512
    temperature: float = 1.0
    max_invocations: int | None = None
    rows_per_rollout: int = 32
    rows_per_forward: int = 4
    gradient_checkpointing: bool | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False
    device: str | None = None
    seed: int = 0
    logging_steps: int = 1
    save_steps: int = 20
    keep_checkpoints: int | None = None
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        whole = ("batch_size", "iterations", "max_words", "rows_per_rollout", "rows_per_forward")
        for name in (*whole, "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least 1.")
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: expected at least 2; a trajectory is judged against others of its "
                "prompt, and alone it would never be better or worse."
            )
        for name in ("max_steps", "keep_checkpoints", "max_invocations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1, or leave it out.")
        for name in ("epochs", "lr", "max_grad_norm", "temperature", "clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}: expected a share of the steps, from 0 to below 1.")
        for name in ("weight_decay", "kl", "end_lr", "target_kl"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value}: expected a number of at least 0.")
        if self.target_kl == 0:
            raise ValueError("target_kl=0: expected a number above 0, or None for a coefficient that stays.")
        if self.scheduler not in SCHEDULES:
            raise ValueError(f"scheduler={self.scheduler!r}: expected one of {', '.join(SCHEDULES)}.")
        if self.gain not in ("replay", "score"):
            raise ValueError(f"gain={self.gain!r}: expected 'replay' or 'score'.")

    @property
    def on_gpu(self) -> bool:
        """Whether training will run on a GPU."""
        return self.device != "cpu" and torch.cuda.is_available()

    def _probability(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class FormationSettings(RlSettings):
    """Stage I: the memory learns what to remember; the policy is frozen and memory is invoked at random.

    Attributes:
        delimiter_share: curriculum: for this share of the steps memory is invoked after delimiters only, from then on
            anywhere. (The paper has this order and no numbers.)
        delimiter_probability: of an invocation after a delimiter, in the first part (ours).
        anywhere_probability: of an invocation after any token, in the second part (ours).
        warm_start_steps: label-free latent distillation before stage I (ours, not in the paper; see
            `keepsight.train.vismem.warm_start`). 0: none.
        warm_start_lr: its peak learning rate.
        warm_start_batch: prompts per step of it.
    """

    delimiter_share: float = 0.5
    delimiter_probability: float = 0.25
    anywhere_probability: float = 0.03
    warm_start_steps: int = 0
    warm_start_lr: float = 3e-3
    warm_start_batch: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._probability("delimiter_share", "delimiter_probability", "anywhere_probability")
        if self.delimiter_probability == self.anywhere_probability == 0:
            raise ValueError("Both invocation probabilities are 0, so no memory would ever be formed.")
        if self.warm_start_steps < 0 or self.warm_start_batch < 1 or not self.warm_start_lr > 0:
            raise ValueError("warm_start_steps, warm_start_batch and warm_start_lr: expected positive numbers.")
        if self.end_lr is not None:
            warnings.warn(
                "end_lr has no effect in stage I: the special tokens' rows are trained in stage II.",
                KeepsightWarning,
                stacklevel=3,
            )


@dataclass(frozen=True, kw_only=True)
class InvocationSettings(RlSettings):
    """Stage II: the policy learns when to invoke which memory; the memory is frozen.

    Attributes:
        train: what of the policy is trained: "tokens", the special tokens' embedding and head rows and biases; "lora",
            those and low-rank adapters on the language model's attention.
        lora_rank, lora_alpha: of those adapters.
        alpha: strength of the penalties p_type and p_neg (not given in the paper).
        invocation_cost: subtracted per invocation (ours; the paper's is 0). Without it a memory that never harms is
            soon invoked always.
        start_bias: added to the invocation tokens' logits at the start (ours), where they are too rare to be tried.
    """

    train: Literal["tokens", "lora"] = "tokens"
    lora_rank: int = 16
    lora_alpha: float = 32
    alpha: float = 0.3
    invocation_cost: float = 0.0
    start_bias: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in ("tokens", "lora"):
            raise ValueError(f"train={self.train!r}: expected 'tokens' or 'lora'.")
        if self.lora_rank < 1 or not self.lora_alpha > 0:
            raise ValueError("lora_rank and lora_alpha: expected positive numbers.")
        for name in ("alpha", "invocation_cost"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number of at least 0.")
        if not math.isfinite(self.start_bias):
            raise ValueError(f"start_bias={self.start_bias}: expected a number.")


def uses_checkpointing(settings: RlSettings, form: str, on_gpu: bool) -> bool:
    """Whether a stage checkpoints gradients.

    Args:
        settings: of the stage.
        form: of the memory. Stage I forms memories with gradients; stage II takes them as they were, in either form.
        on_gpu: whether the model is on a GPU.

    Raises:
        KeepsightError: if it was asked for and cannot be combined with the memory's form.
    """
    wanted = settings.gradient_checkpointing
    if form != "incremental" or not isinstance(settings, FormationSettings):
        return on_gpu if wanted is None else wanted
    if wanted:
        raise KeepsightError(
            "gradient_checkpointing cannot be combined with form='incremental', whose kept keys and values it would "
            "compute twice. Use form='literal', or leave gradient checkpointing off and lower rows_per_forward."
        )
    if on_gpu and wanted is None:
        warnings.warn(
            "Gradient checkpointing, which is usual on a GPU, is off: form='incremental' cannot be combined with it. "
            "If memory runs out, lower rows_per_forward. (gradient_checkpointing=False says that this is meant.)",
            KeepsightWarning,
            stacklevel=3,
        )
    return False
