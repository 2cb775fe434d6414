"""What VisMem's training keeps count of: where a run is, what a step costs, and what is averaged over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from keepsight.train.vismem.moments import Moment
from keepsight.train.vismem.prompts import Prompt
from keepsight.train.vismem.rollout import Trajectory
from keepsight.vismem.memory import Formation
from keepsight.vismem.tokens import LONG

METRICS = "metrics.jsonl"
"""In a run's folder: what was logged, a line for each step."""
STATE = "trainer_state.json"
"""In a checkpoint's folder."""


@dataclass
class VisMemState(TrainerState):
    """Where a run is: transformers' state of a trainer, and what VisMem's loop has beside it.

    Attributes:
        kl_coefficient: of the next step.
        tokens_generated: positions written in rollouts, memories included, by all processes.
        tokens_trained: positions that went through forward and backward: of completions, and of prompts where they were
            not read once for all.
    """

    kl_coefficient: float = 0.0
    tokens_generated: int = 0
    tokens_trained: int = 0

    @classmethod
    def read(cls, checkpoint: Path) -> VisMemState:
        """The state in a checkpoint's folder, also as keepsight wrote it before it was transformers'.

        Raises:
            OSError, ValueError, KeyError, TypeError: if there is none.
        """
        found = json.loads((checkpoint / STATE).read_text())
        old = found.pop("progress", None)
        if old is not None:  # whose logs stood in the run's folder alone, the last of them perhaps cut off
            lines = (checkpoint.parent / METRICS).read_text().splitlines() if old["step"] else []
            logs = [json.loads(line) for line in lines if line.endswith("}")]
            steps = [log for log in logs if log["step"] <= old["step"]]
            found = {name: old[name] for name in ("kl_coefficient", "tokens_generated", "tokens_trained")}
            found |= {"global_step": old["step"], "log_history": steps}
        return cls(**found)


class Accounts:
    """Counts for one process; others are taken to have done as much, since exact counts would need all of them at once.

    Args:
        state: where positions are counted.
        processes: how many train together.
        checkpointing: whether gradients are checkpointed.
        forms_again: whether memories are formed anew in the teacher-forced pass.

    Attributes:
        meter: a `keepsight.train.run.accounting.CostMeter`; None counts positions only.
    """

    def __init__(self, state: VisMemState, processes: int, checkpointing: bool, forms_again: bool):
        self.state, self.processes = state, processes
        self.checkpointing, self.forms_again = checkpointing, forms_again
        self.meter: Any = None
        self._lengths: list[int] = []
        self._patches: list[int] = []

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """The prompts of a step."""
        self._lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
        self._patches = [self.meter.shape.patches(prompt) for prompt in prompts] if self.meter is not None else []

    def warmed(self, prompts: Sequence[Prompt], moment: Moment, latents: Mapping[str, int]) -> None:
        """A step of the warm start: prompts were read, and memories of so many `latents` a type formed and learnt."""
        self.begin(prompts)
        self.read_prompts()
        if self.meter is not None:
            for formation in moment.formations:
                for kind, count in latents.items():
                    self._form(kind, formation, count, passes=2)

    def wrote(self, trajectories: Sequence[Trajectory], shared: bool = True) -> None:
        """A rollout; copies of a prompt have read it once (`shared`), or each by itself."""
        new = [len(t.ids) for t in trajectories]
        self.state.tokens_generated += sum(new) * self.processes
        if self.meter is None or not trajectories:
            return
        rows = [t.prompt for t in trajectories]
        prompts, longest = set(rows), max(self._lengths[row] for row in rows)
        self.meter.read(len(prompts) if shared else len(rows), longest, patches=sum(self._patches[p] for p in prompts))
        self.meter.generated(len(rows), longest, max(new), tokens=sum(new), cached=longest)
        self._formed(trajectories, passes=1)

    def wrote_beside(self, shadows: Sequence[Trajectory]) -> None:
        """Counterfactuals in the rollout itself: only what follows their trajectories' first memories was written."""
        starts = [len(t.ids) - int(t.chosen.sum()) for t in shadows]
        new = [len(t.ids) - start for t, start in zip(shadows, starts, strict=True)]
        self.state.tokens_generated += sum(new) * self.processes
        if self.meter is not None and shadows:
            before = max(self._lengths[t.prompt] + start for t, start in zip(shadows, starts, strict=True))
            self.meter.generated(len(new), before, max(new), tokens=sum(new), cached=before)

    def trained(self, trajectories: Sequence[Trajectory], once: bool) -> None:
        """A forward and a backward; of what follows the prompts, where those were read once."""
        tokens = sum(len(t.ids) + (0 if once else self._lengths[t.prompt]) for t in trajectories)
        self.state.tokens_trained += tokens * self.processes
        if self.meter is not None:
            work = self._forward(trajectories, once) | {"tokens": tokens, "checkpointing": self.checkpointing}
            self.meter.trained(len(trajectories), **work)
            if self.forms_again:
                self._formed(trajectories, passes=2 + self.checkpointing)

    def read(self, trajectories: Sequence[Trajectory], once: bool) -> None:
        """A forward without a backward."""
        if self.meter is not None:
            self.meter.read(len(trajectories), **self._forward(trajectories, once))

    def read_prompts(self) -> None:
        """Every prompt, once, for the teacher-forced passes."""
        if self.meter is not None and self._lengths:
            self.meter.read(len(self._lengths), max(self._lengths), patches=sum(self._patches))

    def _forward(self, trajectories: Sequence[Trajectory], once: bool) -> dict[str, int]:
        """How long, with how many patches, and how much of it was read before."""
        return {
            "length": max(self._lengths[t.prompt] + len(t.ids) for t in trajectories),
            "patches": 0 if once else sum(self._patches[t.prompt] for t in trajectories),
            "cached": max(self._lengths[t.prompt] for t in trajectories) if once else 0,
        }

    def _formed(self, trajectories: Sequence[Trajectory], passes: int) -> None:
        """A long-term memory is a pass of the decoder over what it is formed from, a short-term one of the encoder."""
        for invocation in (i for t in trajectories for i in t.invocations):
            self._form(invocation.kind, invocation.formation, len(invocation.latents), passes)

    def _form(self, kind: str, formation: Formation, latents: int, passes: int) -> None:
        if kind == LONG:
            seen = len(formation.sight.visual) + len(formation.text) + latents
            self.meter.add(self.meter.shape.decoder(1, seen) * passes)
        else:
            assert formation.sight.patches is not None
            self.meter.add(2.0 * self.meter.shape.vision * len(formation.sight.patches.x) * passes)


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
