"""One update of VisMem's training: trajectories and advantages in, optimiser steps on their log-probabilities out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from keepsight.backbone import Backbone
from keepsight.compat import disable_checkpointing, enable_checkpointing
from keepsight.errors import KeepsightError
from keepsight.train.run.trainer import TrainingDivergedError, stop_below_learners
from keepsight.train.vismem import grpo
from keepsight.train.vismem.accounts import Accounts, Means, VisMemState
from keepsight.train.vismem.collect import Rollout
from keepsight.train.vismem.replay import Prefixes, chosen_mask
from keepsight.train.vismem.rollout import Trajectory
from keepsight.train.vismem.settings import RlSettings
from keepsight.train.vismem.stages import Stage


class Update:
    """The optimiser of a stage.

    Args:
        stage: what is trained.
        accelerator: `accelerate.Accelerator`.
        state: where the run is.
        accounts: what it costs.
        uses_checkpointing: whether gradients are checkpointed.
    """

    def __init__(
        self, stage: Stage, accelerator: Any, state: VisMemState, accounts: Accounts, uses_checkpointing: bool
    ):
        self.stage, self.accelerator, self.state, self.accounts = stage, accelerator, state, accounts
        self.uses_checkpointing = uses_checkpointing
        self.settings: RlSettings = stage.settings
        self.optimizer = torch.optim.AdamW(stage.groups(), weight_decay=self.settings.weight_decay)
        self._rising = math.ceil(self.settings.warmup_ratio * state.max_steps)
        name = {"constant": "constant_with_warmup"}.get(self.settings.scheduler, self.settings.scheduler)
        self._schedule = get_scheduler(name, self.optimizer, self._rising, state.max_steps)

    @property
    def rate(self) -> float:
        """The learning rate of the first group."""
        return self.optimizer.param_groups[0]["lr"]

    def set_rate(self, step: int) -> None:
        """Every group's learning rate in step `step` (from 0): transformers' schedule, as a function of the step alone.

        Its rise starts at 0, which would throw the first step's trajectories away; here it is one step ahead.
        """
        place = step + 1 if step < self._rising else step
        groups, schedule = self.optimizer.param_groups, self._schedule
        for group, peak, share in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
            group["lr"] = peak * share(place)

    def take(self, batch: Rollout, total: int, means: Means) -> dict[str, float]:
        """All optimiser steps on one batch; the last one's gradient norms.

        Args:
            batch: this process's trajectories.
            total: trajectories of all processes.
            means: get the loss, its parts and what was clipped.
        """
        settings, stage, advantages = self.settings, self.stage, batch.advantages
        rows = [i for i, trajectory in enumerate(batch.trajectories) if stage.depends(trajectory)]
        others = [i for i in range(len(batch.trajectories)) if i not in set(rows)]
        means.add("loss", -advantages[others])  # constants: their ratio is 1
        # Those of one prompt together, which is read once; and alike lengths.
        rows.sort(key=lambda i: (batch.trajectories[i].prompt, -len(batch.trajectories[i].ids)))
        parts = [rows[i : i + settings.rows_per_forward] for i in range(0, len(rows), settings.rows_per_forward)]
        old: list[torch.Tensor | None] = [None] * len(parts)
        reference: list[torch.Tensor | None] = [None] * len(parts)
        norms: dict[str, float] = {}
        once = not stage.changes_prompts and Prefixes.can_read(stage.model)
        prefixes = Prefixes(stage.model, batch.prompts) if once else None
        if once and rows and (settings.kl or not self.uses_checkpointing):
            self.accounts.read_prompts()
        for iteration in range(settings.iterations):
            for index, part in enumerate(parts):
                own = [batch.trajectories[i] for i in part]
                with torch.no_grad():
                    if iteration == 0 and settings.kl:
                        reference[index] = stage.reference(batch.prompts, own, prefixes)
                        self.accounts.read(own, once)
                    if iteration == 0 and settings.iterations > 1:
                        old[index] = stage.log_probs(batch.prompts, own, prefixes)
                        self.accounts.read(own, once)
                self._backward(batch, own, advantages[part], old[index], reference[index], total, prefixes, means)
            norms = self._apply()
        return norms

    def _backward(
        self,
        batch: Rollout,
        own: list[Trajectory],
        advantages: torch.Tensor,
        old: torch.Tensor | None,
        reference: torch.Tensor | None,
        total: int,
        prefixes: Prefixes | None,
        means: Means,
    ) -> None:
        settings = self.settings
        prefixes = None if self.uses_checkpointing else prefixes  # checkpointed layers take no cache
        with checkpointing(self.stage.model, self.uses_checkpointing):
            log_probs = self.stage.log_probs(batch.prompts, own, prefixes)
            mask = chosen_mask(own).to(log_probs.device)
            before = log_probs.detach() if old is None else old
            advantages = advantages.to(log_probs.device, log_probs.dtype)
            policy = grpo.trajectory_mean(grpo.clipped_loss(log_probs, before, advantages, settings.clip), mask)
            losses = policy
            if reference is not None:
                penalty = grpo.kl_to(log_probs, reference.to(log_probs))
                losses = policy + self.state.kl_coefficient * grpo.trajectory_mean(penalty, mask)
                means.add("kl", penalty[mask])
            loss = losses.sum() / total
            if not torch.isfinite(loss):
                raise TrainingDivergedError(
                    f"The loss is {loss.item()} in step {self.state.global_step + 1}; training has stopped. "
                    f"Checkpoints saved before are whole. Try a lower lr (now {settings.lr:g})."
                )
            if loss.requires_grad:
                loss.backward()
        means.add("loss", losses)
        ratio = (log_probs.detach() - before).exp()
        means.add("clipped", ((ratio - 1).abs() > settings.clip)[mask])
        self.accounts.trained(own, prefixes is not None)

    def _apply(self) -> dict[str, float]:
        """Sum gradients over processes, clip, step; the norms of the gradients before clipping."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            flat = self.accelerator.reduce(flat, "sum")
            start = 0
            for parameter in parameters:
                parameter.grad = flat[start : start + parameter.numel()].view_as(parameter).clone()
                start += parameter.numel()
        norms = {}
        for name, part in self.stage.parts().items():
            grads = [p.grad.norm() for p in part if p.grad is not None]
            norms[f"gradient_norm/{name}"] = float(torch.stack(grads).norm()) if grads else 0.0
        whole = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
        if not math.isfinite(whole):
            raise TrainingDivergedError(
                f"The gradient's norm is {whole} in step {self.state.global_step + 1}; training has stopped. "
                f"Checkpoints saved before are whole. Try a lower lr (now {self.settings.lr:g})."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms | {"gradient_norm": whole}

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the next step depends on besides the model as it was loaded: trained tensors and AdamW's moments."""
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.stage.trained().items():
            found[f"value/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}/{name}"] = value
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` returned.

        Raises:
            KeepsightError: if they are not those that are trained here.
        """
        for name, parameter in self.stage.trained().items():
            if f"value/{name}" not in tensors or tensors[f"value/{name}"].shape != parameter.shape:
                raise KeepsightError(
                    f"The checkpoint has no {name} of shape {tuple(parameter.shape)}; it is of another run."
                )
            parameter.copy_(tensors[f"value/{name}"])
            kept = {
                key.partition("/")[0]: value
                for key, value in tensors.items()
                if key.partition("/")[2] == name and not key.startswith("value/")
            }
            if kept:
                self.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter) for key, value in kept.items()
                }


@contextlib.contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing without training mode: dropout stays off, in the memory and in every other adapter."""
    if not wanted:
        yield
        return
    base = Backbone.of(model).model
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    enable_checkpointing(base)
    stop_below_learners(base)
    for layer in layers:
        layer.training = True  # of this module only, not of those inside
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        disable_checkpointing(base)
