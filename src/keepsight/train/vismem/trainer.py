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
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.rewards.rewards import Reward, score_each
from keepsight.train.vismem import grpo
from keepsight.train.vismem.accounts import Accounts
from keepsight.train.vismem.progress import Means, OnLog, Progress
from keepsight.train.vismem.prompts import Order, Question, Questions, Samples
from keepsight.train.vismem.rollout import Trajectory, row_seed, sample, texts
from keepsight.train.vismem.settings import RlSettings, uses_checkpointing
from keepsight.train.vismem.stage import Batch, Stage, shadow_seeds
from keepsight.train.vismem.update import Update
from keepsight.vismem import MemoryPolicy, VisMemBranch
from keepsight.vismem.tokens import TYPES


class VisMemTrainer:
    """Trains one stage of a VisMem that is on a model.

    Args:
        model: carries VisMem, on its device; the base in any dtype.
        processor: the model's, with the memory's tokens (`add_memory_tokens`).
        samples: {"messages": the turns before the answer, "images": PIL images, and other columns} each.
        rewards: from `keepsight.train.rewards.rewards.load_rewards`.
        stage: what is trained, and why.
        accelerator: `accelerate.Accelerator`; default: a new one.
        on_log: called at every logging step.
        on_step: called as `on_step(trainer)` after every step; checkpoints are its business.
        meter: a `keepsight.train.run.accounting.CostMeter`, or None.
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
        self.progress = Progress(kl_coefficient=self.settings.kl)
        backbone, form = Backbone.of(model), VisMemBranch.of(model).config.form
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KeepsightWarning)  # who made the settings was warned
            checkpoints = uses_checkpointing(self.settings, form, backbone.model.device.type == "cuda")
        processes = accelerator.num_processes
        self.accounts = Accounts(self.progress, meter, processes, checkpoints, stage.forms_again)
        self.update = Update(stage, accelerator, self.progress, self.accounts, checkpoints)
        stage.written = self.accounts.wrote_again
        self._means = Means()

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
                max_words=settings.max_new_tokens,
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
        self.update.set_rate(step, self.steps)
        everyone = self.order.batch(step)
        places = range(self.accelerator.process_index, len(everyone), self.accelerator.num_processes)
        questions = [self.questions[everyone[place]] for place in places]
        seeds = [row_seed(settings.seed, step, place, copy) for place in places for copy in range(settings.group_size)]
        self.accounts.begin([question.inputs for question in questions])
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
        return merged | values | {"kl_coefficient": self.progress.kl_coefficient, "lr": self.update.rate}

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
                max_words=settings.max_new_tokens,
                temperature=settings.temperature,
                rows_per_call=settings.rows_per_rollout,
                shadow_seeds=shadow_seeds(seeds) if self.stage.wants_shadows else None,
            )
            self.accounts.wrote(trajectories)
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
        return self.update.take(batch, advantages, total, self._means)

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
            for key, value in self.update.optimizer.state.get(parameter, {}).items():
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
                self.update.optimizer.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter) for key, value in kept.items()
                }
        vars(self.progress).update(rest)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What still draws from torch's own generator draws the same in every run, and leaves no trace."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
