"""What differs between the stages of VisMem's training: what is trained, what is rewarded, what is held against it.

stage I, formation     trains the query builder, both formers, M_init and the gains; memory is invoked at random;
                       rewards dS; the reference is the same policy had it never had a memory
stage II, invocation   trains the special tokens' rows (and, if asked for, a LoRA on the policy); the model invokes;
                       rewards dS - alpha (p_type + p_neg) - cost * invocations; the reference is the policy as it
                       was before stage II
control                trains the policy, and there is no memory; rewards the score

An objective is a pure function of scores; the trainer writes and scores what each trajectory would have been otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.train.run.learner import policy_lora
from keepsight.train.vismem import grpo
from keepsight.train.vismem.prompts import Prompt
from keepsight.train.vismem.replay import (
    Prefixes,
    formed_latents,
    log_probs,
    log_probs_without_memory,
    recorded_latents,
)
from keepsight.train.vismem.rollout import Counterfactual, Trajectory
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings
from keepsight.vismem import MemoryPolicy, VisMemBranch, parameter_groups
from keepsight.vismem.writing.policy import NO_MEMORY

#: A number for each trajectory: [n].
Values = torch.Tensor
#: What advantages are made of, and values to log.
Objective = tuple[Values, dict[str, Values]]


def active_memory(model: Any) -> Any:
    """The model's active VisMem; raises if there is none."""
    memory = VisMemBranch.of(model).active
    if memory is None:
        raise KeepsightError("No VisMem adapter is active, so there is nothing to train: model.set_adapter(name).")
    return memory


class Stage(ABC):
    """One stage of training. As it stands here, latents are constants and the reference is the start.

    Args:
        model: carries VisMem. What the stage trains requires gradients from here on, and nothing else does.
        settings: of the stage.
    """

    name: str
    title: str
    reference_name: str
    objective_name: str
    invokes = True
    forms_again = False  # memories are formed anew in the teacher-forced pass
    starts_as_reference = True  # so that the start must be remembered

    def __init__(self, model: Any, settings: Any):
        self.model, self.settings, self.memory = model, settings, active_memory(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.trained().values():
            parameter.requires_grad_(True)
        remembers = settings.kl and self.starts_as_reference
        self._start = {name: p.detach().clone() for name, p in self.trained().items()} if remembers else {}

    @abstractmethod
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Name in the model -> parameter."""

    @abstractmethod
    def policy(self, progress: float) -> MemoryPolicy:
        """When memory is invoked, after `progress` (0 to 1) of the steps."""

    @abstractmethod
    def objective(self, scores: Values, without: Values | None, other: Values | None, invocations: Values) -> Objective:
        """What advantages are made of, and values to log.

        Args:
            scores: [n], of trajectories in groups of one prompt.
            without: [n], of the same beginnings without memory; None where the settings leave it out.
            other: [n], of the same beginnings with the other type of memory; None where it was not asked for.
            invocations: how many memories each holds [n].
        """

    @property
    def counterfactuals(self) -> tuple[Counterfactual, ...]:
        """What else must be written and scored: "without" a memory, with the "other" type."""
        return ("without",) if self.settings.gain == "replay" else ()

    @property
    def changes_prompts(self) -> bool:
        """Whether what is trained takes part in reading a prompt, so that its states do not stay."""
        return False

    def groups(self) -> list[dict[str, Any]]:
        """Optimiser groups."""
        return [{"params": list(self.trained().values()), "lr": self.settings.lr}]

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """What is trained, by the names under which gradient norms are logged."""
        return {"policy": list(self.trained().values())}

    def depends(self, trajectory: Trajectory) -> bool:
        """Whether a trajectory's log-probabilities depend on what is trained. Not to invoke is a choice, too."""
        return True

    def latents(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """What the memories of trajectories hold: here what was spliced in when they were written."""
        return recorded_latents(self.model, trajectories)

    def log_probs(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """[n, T], with gradients."""
        latents = self.latents(trajectories)
        return log_probs(self.model, prompts, trajectories, latents, self.settings.temperature, prefixes)

    def reference(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """[n, T], of the reference of the KL penalty: here what is trained as it was at the start."""
        now = self.trained()
        kept = {name: p.data for name, p in now.items()}
        try:
            for name, parameter in now.items():
                parameter.data = self._start[name]
            return self.log_probs(prompts, trajectories, prefixes)
        finally:
            for name, parameter in now.items():
                parameter.data = kept[name]

    def _in_memory(self, wanted: Callable[[str], bool]) -> dict[str, torch.nn.Parameter]:
        own = {id(p): name for name, p in self.memory.named_parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in own and wanted(own[id(p)])}


class FormationStage(Stage):
    """Stage I."""

    name = "formation"
    title = "stage I, formation"
    reference_name = "the policy without memory"
    objective_name = "dS"
    forms_again = True
    starts_as_reference = False
    settings: FormationSettings

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """All of the memory but the special tokens' rows."""
        return self._in_memory(lambda name: not name.startswith("rows."))

    def policy(self, progress: float) -> MemoryPolicy:
        """The curriculum: after delimiters first, then anywhere."""
        settings, early = self.settings, progress < self.settings.delimiter_share
        return MemoryPolicy(
            "random",
            probability=settings.delimiter_probability if early else settings.anywhere_probability,
            places="delimiters" if early else "anywhere",
            max_invocations=settings.max_invocations,
        )

    def objective(self, scores: Values, without: Values | None, other: Values | None, invocations: Values) -> Objective:
        """dS; or the score."""
        if without is None:
            return scores, {}
        gain = grpo.memory_gain(scores, without)
        return gain, {"dS": gain}

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """Query builder, short-term former, long-term former, gains."""
        prefixes = {
            "query_builder": ("builder.",),
            "short_former": ("short_bank.", "short_slots", "to_vision."),
            "long_former": ("long_bank.", "long_slots"),
            "gains": ("short_gain", "long_gain"),
        }
        named = list(self.memory.named_parameters())
        return {part: [p for n, p in named if n.startswith(starts)] for part, starts in prefixes.items()}

    def depends(self, trajectory: Trajectory) -> bool:
        """Without a memory in it, nothing of it depends on the memory modules."""
        return trajectory.invoked

    def latents(self, trajectories: Sequence[Trajectory]) -> torch.Tensor:
        """Memories are formed anew, with gradients."""
        return formed_latents(self.model, trajectories)

    def reference(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """The policy without memory."""
        return log_probs_without_memory(self.model, prompts, trajectories, self.settings.temperature, prefixes)


class InvocationStage(Stage):
    """Stage II."""

    name = "invocation"
    title = "stage II, invocation"
    reference_name = "the policy before stage II"
    objective_name = "dS - alpha (p_type + p_neg) - cost * invocations"
    settings: InvocationSettings

    def __init__(self, model: Any, settings: InvocationSettings):
        if settings.start_bias:
            with torch.no_grad():
                active_memory(model).rows.invoke_bias += settings.start_bias
        super().__init__(model, settings)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The special tokens' rows and biases, and the policy's LoRA."""
        rows = self._in_memory(lambda name: name.startswith("rows."))
        return rows | policy_lora(self.model) if self.settings.train == "lora" else rows

    def policy(self, progress: float) -> MemoryPolicy:
        """The model decides."""
        return MemoryPolicy("free", max_invocations=self.settings.max_invocations)

    def objective(self, scores: Values, without: Values | None, other: Values | None, invocations: Values) -> Objective:
        """dS - alpha (p_type + p_neg) - cost * invocations."""
        settings, invoked = self.settings, invocations > 0
        gain = scores if without is None else grpo.memory_gain(scores, without)
        values = {} if without is None else {"dS": gain}
        p_type = p_neg = torch.zeros_like(scores)
        if other is not None:
            p_type = grpo.penalty(scores, other, invoked)
            p_neg = grpo.penalty(scores, grpo.group_means(scores, settings.group_size), invoked)
            values |= {"p_type": p_type, "p_neg": p_neg}
        cost = settings.invocation_cost
        return grpo.invocation_objective(gain, p_type, p_neg, invocations, settings.alpha, cost), values

    @property
    def counterfactuals(self) -> tuple[Counterfactual, ...]:
        """The other type as well, where the penalties have any strength."""
        return (*super().counterfactuals, "other") if self.settings.alpha else super().counterfactuals

    @property
    def changes_prompts(self) -> bool:
        """The policy's LoRA does; the special tokens stand in no prompt."""
        return self.settings.train == "lora"

    def groups(self) -> list[dict[str, Any]]:
        """The end tokens' rows at a lower rate."""
        groups = parameter_groups(self.model, self.settings.lr, self.settings.end_lr)
        if self.settings.train == "lora":
            groups.append({"params": list(policy_lora(self.model).values()), "lr": self.settings.lr})
        return groups

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """Invocation rows, end rows, LoRA."""
        named = list(self.memory.named_parameters())
        found = {
            "invoke_rows": [p for n, p in named if n.startswith("rows.invoke")],
            "end_rows": [p for n, p in named if n.startswith("rows.end")],
        }
        return found | {"lora": list(policy_lora(self.model).values())} if self.settings.train == "lora" else found


class ControlStage(Stage):
    """A control: the policy learns from the same questions, steps and seeds, and there is no memory.

    Args:
        model: carries a VisMem that is never invoked.
        settings: of the stage that it is held against.
        names: what of the model is trained, by name.
    """

    name = "control"
    title = "a control without memory"
    reference_name = "the policy before"
    objective_name = "the score"
    invokes = False
    counterfactuals = ()
    changes_prompts = True

    def __init__(self, model: Any, settings: Any, names: Sequence[str]):
        self._names = set(names)
        super().__init__(model, settings)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What was named."""
        return {name: p for name, p in self.model.named_parameters() if name in self._names}

    def policy(self, progress: float) -> MemoryPolicy:
        """Never."""
        return NO_MEMORY

    def objective(self, scores: Values, without: Values | None, other: Values | None, invocations: Values) -> Objective:
        """The score: without a memory there is nothing to gain from one."""
        return scores, {}
