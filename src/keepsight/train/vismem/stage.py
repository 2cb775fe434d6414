"""What a stage of VisMem's training is: the part that all stages share, and the questions each of them answers."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.train.vismem import grpo
from keepsight.train.vismem.prefix import Prefixes
from keepsight.train.vismem.rollout import Prompt, Trajectory, counterfactuals, row_seed
from keepsight.vismem import MemoryPolicy, VisMemBranch

#: Called with counterfactuals and their kind, for the accounts.
Written = Callable[[list[Trajectory], str], None]
#: Trajectories -> their scores [n].
Score = Callable[[Sequence[Trajectory]], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """The trajectories of one step, as one process has them.

    Attributes:
        prompts: model inputs of one row each.
        trajectories: G per prompt, next to each other.
        scores: [n].
        seeds: one per trajectory; counterfactuals derive theirs from them.
        score: how to score others.
    """

    prompts: Sequence[Prompt]
    trajectories: list[Trajectory]
    scores: torch.Tensor
    seeds: Sequence[int]
    score: Score

    @property
    def invoked(self) -> torch.Tensor:
        """Bool [n]."""
        return torch.tensor([t.invoked for t in self.trajectories])


def shadow_seeds(seeds: Sequence[int], kind: str = "without") -> list[int]:
    """The seeds of counterfactuals, of their trajectories'."""
    return [row_seed(seed, kind) for seed in seeds]


class Stage(ABC):
    """One stage of training.

    Args:
        model: carries VisMem.
        settings: of the stage.
        written: called with counterfactuals and their kind, for the accounts.
    """

    name: str
    title: str
    forms_again: bool  # memories are formed anew in the teacher-forced pass
    invokes = True
    reference_name: str
    objective_name: str

    def __init__(self, model: Any, settings: Any, written: Written | None = None):
        self.model, self.settings, self.written = model, settings, written
        branch = VisMemBranch.of(model)
        if branch.active is None:
            raise KeepsightError("No VisMem adapter is active, so there is nothing to train: model.set_adapter(name).")
        self.memory = branch.active
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained().values():
            parameter.requires_grad_(True)

    @abstractmethod
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Name in the model -> parameter."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups."""

    @abstractmethod
    def policy(self, progress: float) -> MemoryPolicy:
        """When memory is invoked, after `progress` (0 to 1) of the steps."""

    @abstractmethod
    def objective(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What advantages are made of [n], and values to log, each [n]."""

    @abstractmethod
    def depends(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory's log-probabilities depend on what is trained."""

    @abstractmethod
    def log_probs(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """[n, T], with gradients."""

    @abstractmethod
    def reference(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """[n, T], of the reference of the KL penalty."""

    @abstractmethod
    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """What is trained, by the names under which gradient norms are logged."""

    def _gain(self, batch: Batch) -> torch.Tensor | None:
        """dS [n], by prefix replay; None if the settings leave it out."""
        if self.settings.gain == "score":
            return None
        return grpo.memory_gain(batch.scores, self._scores_of(batch, "without"))

    @property
    def changes_prompts(self) -> bool:
        """Whether what is trained takes part in reading a prompt, so that its states do not stay."""
        return False

    @property
    def wants_shadows(self) -> bool:
        """Whether dS is wanted, so that rollouts should write their counterfactuals beside them."""
        return self.invokes and self.settings.gain == "replay"

    def _scores_of(self, batch: Batch, kind: str) -> torch.Tensor:
        """Scores [n] of the counterfactuals; a trajectory that is its own keeps its score."""
        settings = self.settings
        if kind == "without":  # written beside the trajectories
            others = [t.without or t for t in batch.trajectories]
        else:
            others = counterfactuals(
                self.model,
                batch.prompts,
                batch.trajectories,
                shadow_seeds(batch.seeds, kind),
                kind,
                max_words=settings.max_new_tokens,
                max_invocations=settings.max_invocations,
                temperature=settings.temperature,
                rows_per_call=settings.rows_per_rollout,
            )
        where = [i for i, (a, b) in enumerate(zip(batch.trajectories, others, strict=True)) if a is not b]
        scores = batch.scores.clone()
        if where:
            new = [others[i] for i in where]
            scores[where] = batch.score(new)
            if self.written is not None:
                self.written(new, kind)
        return scores

    def _remember_start(self) -> None:
        self._start = {name: p.detach().clone() for name, p in self.trained().items()} if self.settings.kl else {}

    @contextlib.contextmanager
    def _as_at_start(self) -> Iterator[None]:
        now = self.trained()
        kept = {name: p.data for name, p in now.items()}
        try:
            for name, parameter in now.items():
                parameter.data = self._start[name]
            yield
        finally:
            for name, parameter in now.items():
                parameter.data = kept[name]

    def _named(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def _in_memory(self, wanted: Callable[[str], bool]) -> dict[str, torch.nn.Parameter]:
        own = {id(p): name for name, p in self.memory.named_parameters()}
        return {name: p for name, p in self._named().items() if id(p) in own and wanted(own[id(p)])}
