"""The trainer of VisMem's two stages: a short loop on accelerate over rollouts, objectives and the teacher-forced pass.

One step: read prompts, write G trajectories for each, score them, write counterfactuals where memory was invoked,
make advantages, and take one (or `iterations`) optimiser steps on the log-probabilities of what the model chose.

Everything random in a step follows from (seed, step, prompt, copy), and the order of prompts from (seed, epoch). So a
checkpoint holds the trained tensors, AdamW's moments and the step, and a resumed run is the unbroken run; and a run on
several processes is the run on one: each takes every n-th prompt, and gradients are summed once per optimiser step (a
process in which nothing was invoked adds zeros, so that none waits for another).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError
from keepsight.train import grpo
from keepsight.train.checkpointing import stop_below_learners
from keepsight.train.rewards import Reward, score_each
from keepsight.train.rollout import Trajectory, row_seed, sample, texts
from keepsight.train.trainer import TrainingDivergedError
from keepsight.train.vismem_prompts import Order, Question, Questions, Samples
from keepsight.train.vismem_replay import chosen_mask
from keepsight.train.vismem_settings import RlSettings
from keepsight.train.vismem_stages import Batch, Stage
from keepsight.vismem import MemoryPolicy
from keepsight.vismem.tokens import LONG, TYPES

OnLog = Callable[[dict[str, float], int, int], None]
"""Called as `on_log(values, step, total steps)`."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimiser batches done.
        kl_coefficient: of the next step.
        tokens_generated: positions written in rollouts, memories included, by all processes.
        tokens_trained: positions of prompts and completions that went through forward and backward.
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


class VisMemTrainer:
    """Trains one stage of a VisMem that is on a model.

    Args:
        model: carries VisMem, on its device; the base in any dtype.
        processor: the model's, with the memory's tokens (`add_memory_tokens`).
        samples: {"messages": the turns before the answer, "images": PIL images, and other columns} each.
        rewards: from `keepsight.train.rewards.load_rewards`.
        stage: what is trained, and why.
        accelerator: `accelerate.Accelerator`; default: a new one.
        on_log: called at every logging step.
        on_step: called as `on_step(trainer)` after every step; checkpoints are its business.
        meter: a `keepsight.train.accounting.CostMeter`, or None.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Samples,
        rewards: Sequence[Reward],
        stage: Stage,
        *,
        accelerator: Any = None,
        on_log: OnLog | None = None,
        on_step: Callable[[VisMemTrainer], None] | None = None,
        meter: Any = None,
    ):
        if accelerator is None:
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=Backbone.of(model).model.device.type == "cpu")
        self.model, self.processor, self.rewards, self.stage = model, processor, list(rewards), stage
        self.settings: RlSettings = stage.settings
        self.accelerator, self.on_log, self.on_step, self.meter = accelerator, on_log, on_step, meter
        model.eval()  # no dropout in either pass: the ratio would measure it
        self.questions = Questions(samples, processor, Backbone.of(model).model.dtype)
        self.order = Order(len(samples), self.settings.batch_size, self.settings.seed)
        self.steps = self.settings.max_steps or math.ceil(self.settings.epochs * self.order.steps_per_epoch)
        self.optimizer = torch.optim.AdamW(stage.groups(), weight_decay=self.settings.weight_decay)
        self._peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.progress = Progress(kl_coefficient=self.settings.kl)
        self.stage.written = self._count_written
        self._means = Means()
        self._lengths: list[int] = []
        self._patches: list[int] = []

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def train(self) -> Progress:
        """Take all steps that are left.

        Raises:
            TrainingDivergedError: if a loss or gradient is not finite.
            RewardError: naming a reward that does not return one finite number per completion.
        """
        while self.progress.step < self.steps:
            started = time.perf_counter()
            generated, trained = self.progress.tokens_generated, self.progress.tokens_trained
            values = self._step(self.progress.step)
            seconds = time.perf_counter() - started
            self.progress.step += 1
            self.progress.seconds += seconds
            tokens = self.progress.tokens_generated - generated + self.progress.tokens_trained - trained
            values["tokens_per_second"] = tokens / seconds
            if torch.cuda.is_available():
                values["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            self._log(values)
            if self.on_step is not None:
                self.on_step(self)
        return self.progress

    def evaluate(self, samples: Samples, policy: MemoryPolicy) -> dict[str, float]:
        """Mean scores of one trajectory per question, from seeds of their own: the same for whatever is compared.

        Args:
            samples: held-out questions.
            policy: when memory is invoked.
        """
        settings, questions, means = self.settings, Questions(samples, self.processor, self.questions.dtype), Means()
        own = range(self.accelerator.process_index, len(questions), self.accelerator.num_processes)
        for first in range(0, len(own), settings.rows_per_rollout):
            places = own[first : first + settings.rows_per_rollout]
            asked = [questions[place] for place in places]
            trajectories = sample(
                self.model,
                [question.inputs for question in asked],
                [row_seed(settings.seed, "evaluation", place) for place in places],
                policy,
                max_words=settings.max_words,
                temperature=settings.temperature,
            )
            scores, each = self._score(asked, trajectories)
            means.add("eval_reward", scores)
            means.add("eval_invocations", [float(len(t.invocations)) for t in trajectories])
            for reward, column in zip(self.rewards, each.T, strict=True):
                means.add(f"eval_rewards/{reward.__name__}/mean", column)
        return means.merged(self.accelerator)

    # One step

    def _step(self, step: int) -> dict[str, float]:
        self._means, settings = Means(), self.settings
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * grpo.learning_rate(step, self.steps, settings.warmup_ratio, settings.scheduler)
        everyone = self.order.batch(step)
        places = range(self.accelerator.process_index, len(everyone), self.accelerator.num_processes)
        questions = [self.questions[everyone[place]] for place in places]
        seeds = [row_seed(settings.seed, step, place, copy) for place in places for copy in range(settings.group_size)]
        self._lengths = [q.inputs["input_ids"].shape[1] for q in questions]
        self._patches = [self.meter.shape.patches(q.inputs) for q in questions] if self.meter is not None else []
        with _seeded(row_seed(settings.seed, step, "other draws")):
            batch = self._rollout(questions, seeds, step)
            advantages = self._advantages(batch)
            total = len(everyone) * settings.group_size
            values = self._optimise(batch, advantages, total)
        nothing = (
            {"loss": 0.0, "kl": 0.0} if settings.kl else {"loss": 0.0}
        )  # where nothing depended on what is trained
        merged = nothing | self._means.merged(self.accelerator)
        if settings.kl:
            self.progress.kl_coefficient = grpo.kl_coefficient(settings.kl, merged["kl"], settings.target_kl)
        return merged | values | {"kl_coefficient": self.progress.kl_coefficient, "lr": self._rate}

    @property
    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _rollout(self, questions: Sequence[Question], seeds: Sequence[int], step: int) -> Batch:
        settings, prompts = self.settings, [question.inputs for question in questions]

        def score(trajectories: Sequence[Trajectory]) -> torch.Tensor:
            return self._score(questions, trajectories)[0]

        trajectories: list[Trajectory] = []
        scores = torch.zeros(0)
        if questions:
            trajectories = sample(
                self.model,
                prompts,
                seeds,
                self.stage.policy(step / self.steps),
                copies=settings.group_size,
                max_words=settings.max_words,
                temperature=settings.temperature,
                rows_per_call=settings.rows_per_rollout,
            )
            self._count_written(trajectories)
            scores, each = self._score(questions, trajectories)
            for reward, column in zip(self.rewards, each.T, strict=True):
                self._means.add(f"reward/{reward.__name__}", column)
        self._means.add("reward", scores)
        self._means.add("words", [float(t.words) for t in trajectories])
        for kind in TYPES:
            self._means.add(f"invocations/{kind}", [float(t.count(kind)) for t in trajectories])
        self._means.add("invoked", [float(t.invoked) for t in trajectories])
        return Batch(prompts, trajectories, scores, seeds, score)

    def _score(
        self, questions: Sequence[Question], trajectories: Sequence[Trajectory]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sums [n] and single rewards [n, rewards]."""
        own = [questions[t.prompt] for t in trajectories]
        names = dict.fromkeys(name for question in own for name in question.columns)
        columns = {name: [question.columns.get(name) for question in own] for name in names}
        completions = texts(self.model, self.processor, trajectories)
        each = score_each(self.rewards, [question.messages for question in own], completions, columns)
        return each @ torch.tensor([reward.weight for reward in self.rewards], dtype=each.dtype), each

    def _advantages(self, batch: Batch) -> torch.Tensor:
        if not batch.trajectories:
            return torch.zeros(0)
        objective, more = self.stage.objective(batch)
        for name, values in more.items():
            self._means.add(name, values)
        spread = objective.view(-1, self.settings.group_size).std(1)
        self._means.add("objective", objective)
        self._means.add("group_std", spread)
        self._means.add("groups_without_signal", (spread == 0).double())
        return grpo.group_advantages(objective, self.settings.group_size)

    def _optimise(self, batch: Batch, advantages: torch.Tensor, total: int) -> dict[str, float]:
        settings = self.settings
        rows = [i for i, trajectory in enumerate(batch.trajectories) if self.stage.depends(trajectory)]
        others = [i for i in range(len(batch.trajectories)) if i not in set(rows)]
        self._means.add("loss", -advantages[others])  # constants: their ratio is 1
        rows.sort(key=lambda i: len(batch.trajectories[i].ids), reverse=True)  # alike lengths together
        parts = [rows[i : i + settings.rows_per_forward] for i in range(0, len(rows), settings.rows_per_forward)]
        old: list[torch.Tensor | None] = [None] * len(parts)
        reference: list[torch.Tensor | None] = [None] * len(parts)
        norms: dict[str, float] = {}
        for iteration in range(settings.iterations):
            for index, part in enumerate(parts):
                own = [batch.trajectories[i] for i in part]
                with torch.no_grad():
                    if iteration == 0 and settings.kl:
                        reference[index] = self.stage.reference(batch.prompts, own)
                        self._count_read(own)
                    if iteration == 0 and settings.iterations > 1:
                        old[index] = self.stage.log_probs(batch.prompts, own)
                        self._count_read(own)
                self._backward(batch, own, advantages[part], old[index], reference[index], total)
            norms = self._apply()
        return norms

    def _backward(
        self,
        batch: Batch,
        own: list[Trajectory],
        advantages: torch.Tensor,
        old: torch.Tensor | None,
        reference: torch.Tensor | None,
        total: int,
    ) -> None:
        settings = self.settings
        with checkpointing(self.model, self.uses_checkpointing):
            log_probs = self.stage.log_probs(batch.prompts, own)
            mask = chosen_mask(own).to(log_probs.device)
            before = log_probs.detach() if old is None else old
            advantages = advantages.to(log_probs.device, log_probs.dtype)
            policy = grpo.trajectory_mean(grpo.clipped_loss(log_probs, before, advantages, settings.clip), mask)
            losses = policy
            if reference is not None:
                penalty = grpo.kl_to(log_probs, reference.to(log_probs))
                losses = policy + self.progress.kl_coefficient * grpo.trajectory_mean(penalty, mask)
                self._means.add("kl", penalty[mask])
            loss = losses.sum() / total
            if not torch.isfinite(loss):
                raise TrainingDivergedError(
                    f"The loss is {loss.item()} in step {self.progress.step + 1}; training has stopped. Checkpoints "
                    f"saved before are whole. Try a lower lr (now {settings.lr:g})."
                )
            if loss.requires_grad:
                loss.backward()
        self._means.add("loss", losses)
        ratio = (log_probs.detach() - before).exp()
        self._means.add("clipped", ((ratio - 1).abs() > settings.clip)[mask])
        self._count_trained(own)

    def _apply(self) -> dict[str, float]:
        """Sum gradients over processes, clip, step; the norms of the gradients before clipping."""
        parameters = self._parameters
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
                f"The gradient's norm is {whole} in step {self.progress.step + 1}; training has stopped. Checkpoints "
                f"saved before are whole. Try a lower lr (now {self.settings.lr:g})."
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms | {"gradient_norm": whole}

    @property
    def uses_checkpointing(self) -> bool:
        """Whether gradients are checkpointed."""
        wanted = self.settings.gradient_checkpointing
        return Backbone.of(self.model).model.device.type == "cuda" if wanted is None else wanted

    # Accounts

    def _count_written(self, trajectories: Sequence[Trajectory]) -> None:
        new = [len(t.ids) for t in trajectories]
        self.progress.tokens_generated += self._everywhere(sum(new))
        if self.meter is not None and trajectories:
            lengths = [self._lengths[t.prompt] for t in trajectories]
            patches = sum(self._patches[prompt] for prompt in {t.prompt for t in trajectories})
            self.meter.generated(len(new), max(lengths), max(new), tokens=sum(new), patches=patches)
            self._count_formed(trajectories, backwards=0)

    def _count_trained(self, trajectories: Sequence[Trajectory]) -> None:
        lengths = [self._lengths[t.prompt] + len(t.ids) for t in trajectories]
        self.progress.tokens_trained += self._everywhere(sum(lengths))
        if self.meter is not None:
            again = self.uses_checkpointing
            patches = sum(self._patches[t.prompt] for t in trajectories)
            self.meter.trained(len(lengths), max(lengths), tokens=sum(lengths), patches=patches, checkpointing=again)
            if self.stage.forms_again:
                self._count_formed(trajectories, backwards=1 + again)

    def _count_read(self, trajectories: Sequence[Trajectory]) -> None:
        if self.meter is not None:
            longest = max(self._lengths[t.prompt] + len(t.ids) for t in trajectories)
            patches = sum(self._patches[t.prompt] for t in trajectories)
            self.meter.read(len(trajectories), longest, patches=patches)

    def _count_formed(self, trajectories: Sequence[Trajectory], backwards: int) -> None:
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
        """Other processes are taken to have done as much: exact counts would need all of them at the same place."""
        return count * self.accelerator.num_processes

    def _log(self, values: dict[str, float]) -> None:
        progress, settings = self.progress, self.settings
        values |= {"tokens_generated": progress.tokens_generated, "tokens_trained": progress.tokens_trained}
        progress.first = progress.first or values
        progress.last = values
        if self.on_log is None or not self.accelerator.is_main_process:
            return
        if progress.step == 1 or progress.step % settings.logging_steps == 0 or progress.step == self.steps:
            self.on_log(dict(values), progress.step, self.steps)

    # Saving and loading what a resumed run needs

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors by name, everything else): all that the next step depends on besides the model as it was loaded."""
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.stage.trained().items():
            tensors[f"value/{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        return tensors, dict(vars(self.progress))

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
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
        self.progress = Progress(**rest)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What still draws from torch's own generator draws the same in every run, and leaves no trace."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing without training mode: dropout stays off, in the memory and in every other adapter."""
    if not wanted:
        yield
        return
    base = Backbone.of(model).model
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    base.gradient_checkpointing_enable({"use_reentrant": False})
    stop_below_learners(base)
    for layer in layers:
        layer.training = True  # of this module only, not of those inside
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        base.gradient_checkpointing_disable()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(path.read_text())
