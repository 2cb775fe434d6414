"""What a step of VisMem's training costs: positions written and trained on, and operations by the model's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keepsight.train.vismem.progress import Progress
from keepsight.train.vismem.rollout import Prompt, Trajectory
from keepsight.vismem.tokens import LONG


class Accounts:
    """Counts for one process; others are taken to have done as much, since exact counts would need all of them at once.

    Args:
        progress: where positions are counted.
        meter: a `keepsight.train.run.accounting.CostMeter`, or None.
        processes: how many train together.
        checkpointing: whether gradients are checkpointed.
        forms_again: whether memories are formed anew in the teacher-forced pass.
    """

    def __init__(self, progress: Progress, meter: Any, processes: int, checkpointing: bool, forms_again: bool):
        self.progress, self.meter, self.processes = progress, meter, processes
        self.checkpointing, self.forms_again = checkpointing, forms_again
        self._lengths: list[int] = []
        self._patches: list[int] = []

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """The prompts of a step."""
        self._lengths = [prompt["input_ids"].shape[1] for prompt in prompts]
        self._patches = [self.meter.shape.patches(prompt) for prompt in prompts] if self.meter is not None else []

    def wrote(self, trajectories: Sequence[Trajectory], once: bool = True) -> None:
        """A rollout; every prompt was read once, or once for each."""
        new = [len(t.ids) for t in trajectories]
        self.progress.tokens_generated += self._everywhere(sum(new))
        if self.meter is None or not trajectories:
            return
        prompts = {t.prompt for t in trajectories}
        lengths = [self._lengths[t.prompt] for t in trajectories]
        patches = sum(self._patches[prompt] for prompt in prompts)
        self.meter.generated(len(new), max(lengths), max(new), tokens=sum(new), patches=patches)
        if once:
            self._read_once(trajectories)
        self._formed(trajectories, backwards=0)

    def wrote_again(self, others: Sequence[Trajectory], kind: str) -> None:
        """Counterfactuals: those without memory were written beside their trajectories."""
        if kind == "without":
            self._wrote_beside(others)
        else:
            self.wrote(others, once=False)

    def _wrote_beside(self, shadows: Sequence[Trajectory]) -> None:
        """Only what follows their trajectories' first memories was written."""
        starts = [len(t.ids) - int(t.chosen.sum()) for t in shadows]
        new = [len(t.ids) - start for t, start in zip(shadows, starts, strict=True)]
        self.progress.tokens_generated += self._everywhere(sum(new))
        if self.meter is not None and shadows:
            before = max(self._lengths[t.prompt] + start for t, start in zip(shadows, starts, strict=True))
            self.meter.generated(len(new), before, max(new), tokens=sum(new))
            self.meter.add(-self.meter.shape.decoder(len(new), before))

    def trained(self, trajectories: Sequence[Trajectory], once: bool) -> None:
        """A forward and a backward; of what follows the prompts, where those were read once."""
        lengths = [len(t.ids) + (0 if once else self._lengths[t.prompt]) for t in trajectories]
        self.progress.tokens_trained += self._everywhere(sum(lengths))
        if self.meter is not None:
            again, whole = self.checkpointing, [self._lengths[t.prompt] + len(t.ids) for t in trajectories]
            patches = 0 if once else sum(self._patches[t.prompt] for t in trajectories)
            self.meter.trained(len(lengths), max(whole), tokens=sum(lengths), patches=patches, checkpointing=again)
            if once:
                before = max(self._lengths[t.prompt] for t in trajectories)
                self.meter.add(-self.meter.shape.train(len(lengths), before))
            if self.forms_again:
                self._formed(trajectories, backwards=1 + again)

    def read(self, trajectories: Sequence[Trajectory], once: bool) -> None:
        """A forward without a backward."""
        if self.meter is not None:
            longest = max(self._lengths[t.prompt] + len(t.ids) for t in trajectories)
            patches = 0 if once else sum(self._patches[t.prompt] for t in trajectories)
            self.meter.read(len(trajectories), longest, patches=patches)
            if once:
                before = max(self._lengths[t.prompt] for t in trajectories)
                self.meter.add(-self.meter.shape.decoder(len(trajectories), before))

    def read_prompts(self) -> None:
        """Every prompt, once, for the teacher-forced passes."""
        if self.meter is not None and self._lengths:
            self.meter.read(len(self._lengths), max(self._lengths), patches=sum(self._patches))

    def _read_once(self, trajectories: Sequence[Trajectory]) -> None:
        """Take off what copies of a prompt did not read again."""
        longest, shape = max(self._lengths[t.prompt] for t in trajectories), self.meter.shape
        distinct = len({t.prompt for t in trajectories})
        self.meter.add(shape.decoder(distinct, longest) - shape.decoder(len(trajectories), longest))

    def _formed(self, trajectories: Sequence[Trajectory], backwards: int) -> None:
        """A long-term memory is a pass of the decoder over what it is formed from, a short-term one of the encoder."""
        for invocation in (i for t in trajectories for i in t.invocations):
            formation, shape = invocation.formation, self.meter.shape
            if invocation.kind == LONG:
                seen = len(formation.sight.visual) + len(formation.text) + len(invocation.latents)
                self.meter.add(shape.decoder(1, seen) * (1 + backwards))
            else:
                assert formation.sight.patches is not None
                self.meter.add(2.0 * shape.vision * len(formation.sight.patches.x) * (1 + backwards))

    def _everywhere(self, count: int) -> int:
        return count * self.processes
