"""Collect rollouts: sample trajectories and counterfactuals, score them, compute advantages."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepsight.errors import KeepsightWarning
from keepsight.train.rewards.rewards import Reward, score_completions
from keepsight.train.vismem.accounts import Accounts, Means
from keepsight.train.vismem.grpo import group_advantages
from keepsight.train.vismem.prompts import Prompt, ReadySample
from keepsight.train.vismem.rollout import Counterfactual, Trajectory, counterfactuals, row_seed, sample, texts
from keepsight.train.vismem.settings import RlSettings
from keepsight.train.vismem.stages import Stage
from keepsight.vismem.tokens import TYPES


@dataclass(frozen=True)
class Rollout:
    """The trajectories of one step, as one process has them.

    Attributes:
        prompts: model inputs of one row each.
        trajectories: G per prompt, next to each other.
        advantages: [n].
    """

    prompts: Sequence[Prompt]
    trajectories: list[Trajectory]
    advantages: torch.Tensor


class Collector:
    """Writes and scores.

    Args:
        model: carries VisMem; in eval mode.
        processor: the model's, which makes texts of ids.
        rewards: what is scored.
        stage: says which memory is invoked when, what else is to be written, and what scores are worth.
        accounts: count what is written.
    """

    def __init__(self, model: Any, processor: Any, rewards: Sequence[Reward], stage: Stage, accounts: Accounts):
        self.model, self.processor, self.rewards = model, processor, list(rewards)
        self.stage, self.accounts = stage, accounts
        self.settings: RlSettings = stage.settings

    def collect(self, questions: Sequence[ReadySample], seeds: Sequence[int], progress: float, means: Means) -> Rollout:
        """Trajectories and their advantages.

        Args:
            questions: of this process; none where there are fewer than processes.
            seeds: one per trajectory; counterfactuals derive theirs from them.
            progress: share of the steps that are done, from 0 to 1.
            means: get scores, and what was invoked.
        """
        settings, prompts = self.settings, [question.inputs for question in questions]
        beside = "without" in self.stage.counterfactuals
        trajectories: list[Trajectory] = []
        scores = torch.zeros(0)
        if questions:
            trajectories = sample(
                self.model,
                prompts,
                seeds,
                self.stage.policy(progress),
                copies=settings.group_size,
                max_words=settings.max_new_tokens,
                temperature=settings.temperature,
                rows_per_call=settings.rows_per_rollout,
                shadow_seeds=_others(seeds, "without") if beside else None,
            )
            self.accounts.wrote(trajectories)
            scores, each = self.score(questions, trajectories)
            for reward, column in zip(self.rewards, each.T, strict=True):
                means.add(f"reward/{reward.__name__}", column)
        means.add("reward", scores)
        means.add("words", [float(t.words) for t in trajectories])
        for kind in TYPES:
            means.add(f"invocations/{kind}", [float(t.count(kind)) for t in trajectories])
        means.add("invoked", [float(t.invoked) for t in trajectories])
        if not trajectories:
            return Rollout(prompts, trajectories, scores)
        otherwise = {
            kind: self._otherwise(kind, questions, trajectories, scores, seeds) for kind in self.stage.counterfactuals
        }
        invocations = torch.tensor([len(t.invocations) for t in trajectories])
        objective, values = self.stage.objective(scores, otherwise.get("without"), otherwise.get("other"), invocations)
        spread = objective.view(-1, settings.group_size).std(1)
        for name, row in (*values.items(), ("objective", objective), ("group_std", spread)):
            means.add(name, row)
        means.add("groups_without_signal", (spread == 0).double())
        return Rollout(prompts, trajectories, group_advantages(objective, settings.group_size))

    def score(
        self, questions: Sequence[ReadySample], trajectories: Sequence[Trajectory]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sums [n] and single rewards [n, rewards]."""
        own = [questions[t.prompt] for t in trajectories]
        names = dict.fromkeys(name for question in own for name in question.columns)
        columns = {name: [question.columns.get(name) for question in own] for name in names}
        completions = texts(self.model, self.processor, trajectories)
        return score_completions(self.rewards, [question.messages for question in own], completions, columns)

    def _otherwise(
        self,
        kind: Counterfactual,
        questions: Sequence[ReadySample],
        trajectories: Sequence[Trajectory],
        scores: torch.Tensor,
        seeds: Sequence[int],
    ) -> torch.Tensor:
        """Scores [n] of the counterfactuals; a trajectory that is its own keeps its score."""
        settings = self.settings
        if kind == "without":  # written beside the trajectories
            others = [t.without or t for t in trajectories]
        else:
            others = counterfactuals(
                self.model,
                [question.inputs for question in questions],
                trajectories,
                _others(seeds, kind),
                kind,
                max_words=settings.max_new_tokens,
                max_invocations=settings.max_invocations,
                temperature=settings.temperature,
                rows_per_call=settings.rows_per_rollout,
            )
        where = [i for i, (a, b) in enumerate(zip(trajectories, others, strict=True)) if a is not b]
        if not where:
            return scores
        new = [others[i] for i in where]
        if kind == "without":
            self.accounts.wrote_beside(new)
        else:
            self.accounts.wrote(new, shared=False)
        scores = scores.clone()
        scores[where] = self.score(questions, new)[0]
        return scores


def _others(seeds: Sequence[int], kind: Counterfactual) -> list[int]:
    """The seeds of counterfactuals, of their trajectories'."""
    return [row_seed(seed, kind) for seed in seeds]


def warn_of_no_signal(steps: Sequence[Mapping[str, float]], invokes: bool, folder: Path | None) -> None:
    """Warn of a run whose rewards or memories, by its logs, can have taught nothing.

    Args:
        steps: what was logged.
        invokes: whether there is a memory; controls invoke none.
        folder: of the run.
    """
    if invokes and steps and all(step.get("invoked") == 0 for step in steps):
        why = (
            "no memory was invoked in any step, so none learned. In stage I raise --delimiter-probability "
            "and --anywhere-probability (or check that texts have delimiters), in stage II --start-bias"
        )
    elif steps and all(step.get("groups_without_signal") == 1 for step in steps):
        why = (
            "in no step did the rewards of a question's trajectories differ, so they taught nothing. Look at what is "
            "written and scored, raise --temperature or --group-size, or take questions that are answered sometimes"
        )
    else:
        return
    warnings.warn(f"{folder}: {why}.", KeepsightWarning, stacklevel=2)
