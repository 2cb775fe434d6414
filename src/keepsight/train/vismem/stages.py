"""What differs between the two stages of VisMem's training: what is trained, what is rewarded, what is held against it.

stage I, formation     trains the query builder, both formers, M_init and the gains; memory is invoked at random;
                       rewards dS; the reference is the same policy had it never had a memory
stage II, invocation   trains the special tokens' rows (and, if asked for, a LoRA on the policy); the model invokes;
                       rewards dS - alpha (p_type + p_neg) - cost * invocations; the reference is the policy as it
                       was before stage II
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from keepsight.errors import KeepsightError
from keepsight.train.vismem import grpo
from keepsight.train.vismem.prefix import Prefixes
from keepsight.train.vismem.replay import formed_latents, log_probs, log_probs_without_memory, recorded_latents
from keepsight.train.vismem.rollout import NO_MEMORY, Prompt, Trajectory
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings
from keepsight.train.vismem.stage import Batch, Stage, Written
from keepsight.vismem import MemoryPolicy, parameter_groups
from keepsight.vismem.tokens import TYPES

#: The tuner prefix of the LoRA that stage II may train.
POLICY = "policy"


@contextlib.contextmanager
def without_policy(model: Any) -> Iterator[None]:
    """The model without the LoRA that stage II trains on its policy."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and POLICY in m.lora_A]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class Formation(Stage):
    """Stage I."""

    name = "formation"
    title = "stage I, formation"
    forms_again = True
    reference_name = "the policy without memory"
    objective_name = "dS"
    settings: FormationSettings

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """All of the memory but the special tokens' rows."""
        return self._in_memory(lambda name: not name.startswith("rows."))

    def groups(self) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": list(self.trained().values()), "lr": self.settings.lr}]

    def policy(self, progress: float) -> MemoryPolicy:
        """The curriculum: after delimiters first, then anywhere."""
        settings = self.settings
        if progress < settings.delimiter_share:
            return MemoryPolicy(
                "random", probability=settings.delimiter_probability, max_invocations=settings.max_invocations
            )
        return MemoryPolicy(
            "random",
            probability=settings.anywhere_probability,
            places="anywhere",
            max_invocations=settings.max_invocations,
        )

    def objective(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """dS; or the score."""
        gain = self._gain(batch)
        return (batch.scores, {}) if gain is None else (gain, {"dS": gain})

    def depends(self, trajectory: Trajectory) -> bool:
        """Without a memory in it, nothing of it depends on the memory modules."""
        return trajectory.invoked

    def log_probs(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """Memories are formed anew, with gradients."""
        latents = formed_latents(self.model, trajectories)
        return log_probs(self.model, prompts, trajectories, latents, self.settings.temperature, prefixes)

    def reference(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """The policy without memory."""
        return log_probs_without_memory(self.model, prompts, trajectories, self.settings.temperature, prefixes)

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


class Invocation(Stage):
    """Stage II."""

    name = "invocation"
    title = "stage II, invocation"
    forms_again = False
    reference_name = "the policy before stage II"
    objective_name = "dS - alpha (p_type + p_neg) - cost * invocations"
    settings: InvocationSettings

    def __init__(self, model: Any, settings: Any, written: Written | None = None):
        super().__init__(model, settings, written)
        if settings.start_bias:
            with torch.no_grad():
                self.memory.rows.invoke_bias += settings.start_bias
        self._remember_start()

    @property
    def changes_prompts(self) -> bool:
        """The policy's LoRA does; the special tokens stand in no prompt."""
        return self.settings.train == "lora"

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The special tokens' rows and biases, and the policy's LoRA."""
        rows = self._in_memory(lambda name: name.startswith("rows."))
        if self.settings.train == "tokens":
            return rows
        adapters = {n: p for n, p in self._named().items() if ".lora_" in n and f".{POLICY}." in n}
        if not adapters:
            raise KeepsightError(
                f"train='lora': the model carries no LoRA named {POLICY!r}; train_vismem_invocation adds one."
            )
        return rows | adapters

    def groups(self) -> list[dict[str, Any]]:
        """The end tokens' rows at a lower rate."""
        groups = parameter_groups(self.model, self.settings.lr, self.settings.end_lr)
        adapters = [p for name, p in self.trained().items() if ".lora_" in name]
        return [*groups, {"params": adapters, "lr": self.settings.lr}] if adapters else groups

    def policy(self, progress: float) -> MemoryPolicy:
        """The model decides."""
        return MemoryPolicy("free", max_invocations=self.settings.max_invocations)

    def objective(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """dS - alpha (p_type + p_neg) - cost * invocations."""
        settings, scores = self.settings, batch.scores
        gain = self._gain(batch)
        values = {} if gain is None else {"dS": gain}
        p_type = p_neg = torch.zeros_like(scores)
        if settings.alpha:
            p_type = grpo.type_penalty(scores, self._scores_of(batch, "other"), batch.invoked)
            p_neg = grpo.negative_penalty(scores, settings.group_size, batch.invoked)
            values |= {"p_type": p_type, "p_neg": p_neg}
        count = torch.tensor([sum(t.count(kind) for kind in TYPES) for t in batch.trajectories])
        paid = scores if gain is None else gain
        return (
            grpo.invocation_objective(paid, p_type, p_neg, count, settings.alpha, settings.invocation_cost),
            values,
        )

    def depends(self, trajectory: Trajectory) -> bool:
        """Not to invoke is a choice, too."""
        return True

    def log_probs(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """Latents are constants of the trajectory."""
        latents = recorded_latents(self.model, trajectories)
        return log_probs(self.model, prompts, trajectories, latents, self.settings.temperature, prefixes)

    def reference(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """The policy before stage II, on the same latents."""
        with self._as_at_start():
            return self.log_probs(prompts, trajectories, prefixes)

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """Invocation rows, end rows, LoRA."""
        named = list(self.memory.named_parameters())
        found = {
            "invoke_rows": [p for n, p in named if n.startswith("rows.invoke")],
            "end_rows": [p for n, p in named if n.startswith("rows.end")],
            "lora": [p for n, p in self.trained().items() if ".lora_" in n],
        }
        return {name: values for name, values in found.items() if values}


class PolicyAlone(Stage):
    """A control: the policy learns from the same questions, steps and seeds, and there is no memory.

    Args:
        model: carries a VisMem that is never invoked.
        settings: of the stage that it is held against.
        names: what of the model is trained, by name.
    """

    name = "control"
    title = "a control without memory"
    forms_again = False
    invokes = False
    reference_name = "the policy before"
    objective_name = "the score"

    def __init__(self, model: Any, settings: Any, names: Sequence[str]):
        self._names = set(names)
        super().__init__(model, settings)
        self._remember_start()

    @property
    def changes_prompts(self) -> bool:
        """The policy reads them."""
        return True

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What was named."""
        return {name: p for name, p in self._named().items() if name in self._names}

    def groups(self) -> list[dict[str, Any]]:
        """One group."""
        return [{"params": list(self.trained().values()), "lr": self.settings.lr}]

    def policy(self, progress: float) -> MemoryPolicy:
        """Never."""
        return NO_MEMORY

    def objective(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The score: without a memory there is nothing to gain from one."""
        return batch.scores, {}

    def depends(self, trajectory: Trajectory) -> bool:
        """Every trajectory."""
        return True

    def log_probs(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """Of plain text."""
        latents = recorded_latents(self.model, trajectories)
        return log_probs(self.model, prompts, trajectories, latents, self.settings.temperature, prefixes)

    def reference(
        self, prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], prefixes: Prefixes | None = None
    ) -> torch.Tensor:
        """The policy as it was."""
        with self._as_at_start():
            return self.log_probs(prompts, trajectories, prefixes)

    def parts(self) -> dict[str, list[torch.nn.Parameter]]:
        """All of it."""
        return {"policy": list(self.trained().values())}
