"""How to train a latent vision memory: every setting of the two stages, its default and its meaning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from keepsight.train.run.fields import MEMORY, REWARD, RUN, STEPS, documented, setting
from keepsight.train.run.settings import CommonSettings

SCHEDULES = ("cosine", "linear", "constant")


@documented
@dataclass(frozen=True, kw_only=True)
class RlSettings(CommonSettings):
    """What both stages share. Defaults are the paper's where it names them; "ours" marks what it does not.

    Gradients are checkpointed by default on a GPU. The gradient norm is ours. The paper gives `target_kl` and no rule.
    """

    epochs: float = setting(2.0, "Passes over the data.", STEPS)
    batch_size: int = setting(8, "Questions per step, all processes together.", STEPS)
    group_size: int = setting(16, "G, trajectories per question.", REWARD)
    iterations: int = setting(1, "Optimiser steps per batch of trajectories.", STEPS)
    lr: float = setting(5e-5, "Peak learning rate.", STEPS)
    warmup_ratio: float = setting(0.2, "Share of the steps with a rising rate.", STEPS)
    scheduler: Literal["cosine", "linear", "constant"] = setting("cosine", "How the rate falls.", STEPS)
    weight_decay: float = setting(0.0, "Of everything that is trained.", STEPS)
    clip: float = setting(0.2, "How far the ratio may move.", STEPS)
    kl: float = setting(0.015, "Coefficient of the KL penalty; 0 for none.", STEPS)
    target_kl: float | None = setting(
        0.03, "KL per token above which the coefficient grows in proportion; 0 for never.", STEPS, zero_is_none=True
    )
    gain: Literal["replay", "score"] = setting(
        "replay",
        "replay: the paper's dS, score minus that of the same beginning continued without memory. score: the score "
        "alone, which saves those rollouts (ours).",
        REWARD,
    )
    max_new_tokens: int = setting(
        512,
        "Longest completion in tokens of text; memories do not count.",
        REWARD,
    )
    temperature: float = setting(1.0, "Of sampling.", REWARD)
    max_invocations: int | None = setting(
        None, "At most so many memories per trajectory. Default: the memory's own setting.", REWARD
    )
    rows_per_rollout: int = setting(32, "Trajectories written at once by one process.", RUN)
    rows_per_forward: int = setting(4, "Trajectories in one forward and backward: memory, not results.", RUN)
    logging_steps: int = setting(1, "A line every so many steps.", RUN)
    save_steps: int = setting(20, "A checkpoint every so many steps.", RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._whole("iterations", "max_new_tokens", "rows_per_rollout", "rows_per_forward", "max_invocations")
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: expected at least 2; a trajectory is judged against others of its "
                "prompt, and alone it would never be better or worse."
            )
        self._positive("temperature", "clip")
        self._not_negative("kl", "target_kl")
        if self.target_kl == 0:
            raise ValueError("target_kl=0: expected a number above 0, or None for a coefficient that stays.")
        if self.scheduler not in SCHEDULES:
            raise ValueError(f"scheduler={self.scheduler!r}: expected one of {', '.join(SCHEDULES)}.")
        if self.gain not in ("replay", "score"):
            raise ValueError(f"gain={self.gain!r}: expected 'replay' or 'score'.")

    def _probability(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number from 0 to 1.")


@documented
@dataclass(frozen=True, kw_only=True)
class FormationSettings(RlSettings):
    """Stage I: the memory learns what to remember; the policy is frozen and memory is invoked at random.

    The paper has the curriculum's order and no numbers; the probabilities are ours. See
    `keepsight.train.vismem.warm_start` for the warm start, which is ours too.
    """

    delimiter_share: float = setting(
        0.5, "For this share of the steps memory is invoked after delimiters only.", MEMORY
    )
    delimiter_probability: float = setting(0.25, "Of an invocation there.", MEMORY)
    anywhere_probability: float = setting(
        0.03, "Of an invocation before the first token and after any other, from then on.", MEMORY
    )
    warm_start_steps: int = setting(
        0,
        "Steps of label-free latent distillation before stage I. Ours, not in the paper; without it stage I "
        "learned nothing of the image in our laboratory.",
        MEMORY,
    )
    warm_start_lr: float = setting(3e-3, "Its peak learning rate.", MEMORY)
    warm_start_batch: int = setting(8, "Questions per step of it.", MEMORY)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._probability("delimiter_share", "delimiter_probability", "anywhere_probability")
        if self.delimiter_probability == self.anywhere_probability == 0:
            raise ValueError("Both invocation probabilities are 0, so no memory would ever be formed.")
        if self.warm_start_steps < 0 or self.warm_start_batch < 1 or not self.warm_start_lr > 0:
            raise ValueError("warm_start_steps, warm_start_batch and warm_start_lr: expected positive numbers.")


@documented
@dataclass(frozen=True, kw_only=True)
class InvocationSettings(RlSettings):
    """Stage II: the policy learns when to invoke which memory; the memory is frozen."""

    train: Literal["tokens", "lora"] = setting(
        "tokens",
        "What of the policy: the special tokens' rows and biases; or those and a LoRA on the language model's "
        "attention.",
        STEPS,
    )
    lora_rank: int = setting(16, "Of the policy's LoRA.", STEPS)
    lora_alpha: float = setting(32, "Of the policy's LoRA.", STEPS)
    end_lr: float | None = setting(
        None, 'Of the end tokens\' rows. Default: a tenth of --lr (the paper says "lower").', STEPS
    )
    alpha: float = setting(0.3, "Strength of the penalties p_type and p_neg (the paper gives none).", REWARD)
    invocation_cost: float = setting(
        0.0,
        "Subtracted per invocation. Ours; the paper's is 0, with which our laboratory learned to invoke always.",
        REWARD,
    )
    start_bias: float = setting(
        0.0, "Added to the invocation tokens' logits at the start, where they are too rare.", MEMORY
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in ("tokens", "lora"):
            raise ValueError(f"train={self.train!r}: expected 'tokens' or 'lora'.")
        if self.lora_rank < 1 or not self.lora_alpha > 0:
            raise ValueError("lora_rank and lora_alpha: expected positive numbers.")
        self._not_negative("alpha", "invocation_cost", "end_lr")
        if not math.isfinite(self.start_bias):
            raise ValueError(f"start_bias={self.start_bias}: expected a number.")


def uses_checkpointing(settings: RlSettings, on_gpu: bool) -> bool:
    """Whether a stage checkpoints gradients: as asked, otherwise on a GPU."""
    return on_gpu if settings.gradient_checkpointing is None else settings.gradient_checkpointing
