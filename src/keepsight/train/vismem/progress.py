"""Where a run of VisMem's training is, and what is averaged over a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OnLog = Callable[[dict[str, float], int, int], None]
"""Called as `on_log(values, step, total steps)`."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimiser batches done.
        kl_coefficient: of the next step.
        tokens_generated: positions written in rollouts, memories included, by all processes.
        tokens_trained: positions that went through forward and backward: of completions, and of prompts where they were
            not read once for all.
        seconds: in the training loop.
        first, last: the first and the last logged values.
    """

    step: int = 0
    kl_coefficient: float = 0.0
    tokens_generated: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


class Means:
    """Means of what happened in a step, over all processes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, values: torch.Tensor | Sequence[float]) -> None:
        """Values to average over."""
        found = torch.as_tensor(values).detach().cpu().double().flatten()
        self.sums[name] = self.sums.get(name, 0.0) + float(found.sum())
        self.counts[name] = self.counts.get(name, 0) + len(found)

    def merged(self, accelerator: Any) -> dict[str, float]:
        """Name -> mean over all processes."""
        parts = [(self.sums, self.counts)]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            parts = gather_object(parts)
        names = dict.fromkeys(name for sums, _ in parts for name in sums)
        total = {name: sum(sums.get(name, 0.0) for sums, _ in parts) for name in names}
        count = {name: sum(counts.get(name, 0) for _, counts in parts) for name in names}
        return {name: total[name] / count[name] for name in names if count[name]}
