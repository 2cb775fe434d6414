"""What a run of VisMem's training tells: its report, and the card of its adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.card import names_base
from keepsight.data.check import CheckedData
from keepsight.train.rewards.rewards import Reward
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import Comparison, Outcome
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings
from keepsight.train.vismem.trainer import VisMemTrainer
from keepsight.vismem import VisMemBranch


@dataclass(frozen=True)
class VisMemReport:
    """What a run did, all measured in it.

    Attributes:
        output_dir: where the adapter and its processor are.
        stage: "formation" or "invocation".
        steps: of the whole run, those before a resume included.
        resumed_from: step of the checkpoint the run went on from, or None.
        trained: trained parameters.
        untouched: tensors that were not to be trained and of which no bit changed (compared at the end).
        changed: trained tensors that changed.
        reference: what the KL penalty is measured against.
        first, last: what was logged at the first and the last step.
        tokens_generated, tokens_trained: positions written, and positions that gradients went through.
        seconds: in the training loop, those before a resume included.
        cost: what the run cost.
        data: what was checked, skipped and kept.
        warm_start: what the warm start did, or None.
        metrics: mean scores of held-out questions after the last step, or None.
        comparison: the same data, steps and seeds without the memory, if controls were asked for.
    """

    output_dir: Path
    stage: str
    steps: int
    resumed_from: int | None
    trained: int
    untouched: int
    changed: int
    reference: str
    first: dict[str, float]
    last: dict[str, float]
    tokens_generated: int
    tokens_trained: int
    seconds: float
    cost: RunCost
    data: CheckedData
    warm_start: Any = None
    metrics: dict[str, float] | None = None
    comparison: Comparison | None = None

    def outcome(self, name: str, what: str, lr: float | None) -> Outcome:
        """As a row of a comparison."""
        return Outcome(
            name,
            what,
            self.output_dir,
            self.trained,
            lr,
            self.steps,
            first_reward=self.first.get("reward"),
            last_reward=self.last.get("reward"),
            metrics=self.metrics,
            cost=self.cost,
        )


def card(source: str | Path, rewards: list[Reward], trainer: VisMemTrainer) -> str:
    """The README of the adapter folder, which is also its card on the hub."""
    first, last, settings = trainer.progress.first, trainer.progress.last, trainer.settings
    config = VisMemBranch.of(trainer.model).config
    reward = f"{first.get('reward', math.nan):.4f} at first, {last.get('reward', math.nan):.4f} at last"
    more = ""
    if isinstance(settings, FormationSettings):
        more = f"| warm start (ours, not in the paper) | {settings.warm_start_steps} steps |\n"
    if isinstance(settings, InvocationSettings):
        more = f"| invocation cost (ours; the paper's is 0) | {settings.invocation_cost:g} |\n"
    return f"""---
{names_base(config.base_model_name_or_path or str(source))}library_name: peft
tags: [keepsight, vismem, vision-language]
---

# A latent vision memory (VisMem), {trainer.stage.title}

Made with keepsight from {source}; the base model is unchanged.

```python
import keepsight

model, processor = keepsight.load("this folder or its hub id")
```

| | |
|---|---|
| method | VisMem (arXiv 2511.11007), {config.form} form |
| K, N_s, N_l | {config.num_queries}, {config.num_short}, {config.num_long} |
| training | {trainer.progress.step} steps, {settings.batch_size} prompts x {settings.group_size} trajectories |
| rewards | {", ".join(f"{r.weight:g} x {r.name}" for r in rewards)} |
| mean reward | {reward} |
| KL against | {trainer.stage.reference_name} |
| peak learning rate | {settings.lr:g}; seed {settings.seed} |
{more}"""
