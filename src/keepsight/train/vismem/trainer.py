"""The trainer of VisMem's stages: a short loop on accelerate over rollouts, objectives and the teacher-forced pass.

One step: read prompts, write G trajectories for each, score them, write counterfactuals where memory was invoked,
make advantages, and take one (or `iterations`) optimiser steps on the log-probabilities of what the model chose.

Everything random in a step follows from (seed, step, prompt, copy), and the order of prompts from (seed, epoch). So a
checkpoint holds the trained tensors, AdamW's moments and the state, and a resumed run is the unbroken run; and a run on
several processes is the run on one: each takes every n-th prompt, and gradients are summed once per optimiser step (a
process in which nothing was invoked adds zeros, so that none waits for another).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from keepsight.backbone import Backbone
from keepsight.checkpoints.atomic import new_folder, write_text
from keepsight.errors import KeepsightError
from keepsight.train.rewards.rewards import Reward
from keepsight.train.run import output
from keepsight.train.run.checksums import digest
from keepsight.train.run.learner import without_policy
from keepsight.train.run.preflight import Say, silent
from keepsight.train.run.trainer import OnLog
from keepsight.train.vismem import grpo
from keepsight.train.vismem.accounts import METRICS, STATE, Accounts, Means, VisMemState
from keepsight.train.vismem.collect import Collector, warn_of_no_signal
from keepsight.train.vismem.prompts import QuestionOrder, Questions, Samples
from keepsight.train.vismem.rollout import row_seed, sample
from keepsight.train.vismem.settings import FormationSettings, RlSettings, uses_checkpointing
from keepsight.train.vismem.stages import Stage
from keepsight.train.vismem.update import Update
from keepsight.train.vismem.warm_start import WarmStartReport, warm_up
from keepsight.vismem import MemoryPolicy
from keepsight.vismem.writing.policy import NO_MEMORY

TRAINED = "trained.safetensors"
"""In a checkpoint: what is trained, and the optimiser's state."""


class VisMemTrainer:
    """Trains one stage of a VisMem that is on a model. It is used as transformers' Trainer is: `train`, `evaluate`,
    `save_model`, `state`.

    Args:
        model: carries VisMem, on its device; the base in any dtype.
        processor: the model's, with the memory's tokens (`add_memory_tokens`).
        samples: {"messages": the turns before the answer, "images": PIL images, and other columns} each.
        rewards: from `keepsight.train.rewards.rewards.load_rewards`.
        stage: what is trained, and why.
        eval_samples: held-out questions, for `evaluate`.
        folder: gets metrics and checkpoints; None keeps neither.
        save: writes what was trained, and the processor, into a folder.
        accelerator: `accelerate.Accelerator`; default: a new one.
        on_log: called at every logging step.
        say: receives lines for the user.
        record: what trackers are told of the run.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Samples,
        rewards: Sequence[Reward],
        stage: Stage,
        *,
        eval_samples: Samples | None = None,
        folder: Path | None = None,
        save: Callable[[Path], None] | None = None,
        accelerator: Any = None,
        on_log: OnLog | None = None,
        say: Say = silent,
        record: Mapping[str, Any] | None = None,
    ):
        base = Backbone.of(model).model
        if accelerator is None:
            from accelerate import Accelerator

            accelerator = Accelerator(cpu=base.device.type == "cpu")
        self.model, self.processing_class, self.stage, self.accelerator = model, processor, stage, accelerator
        self.folder, self.save, self.on_log, self.say, self.record = folder, save, on_log, say, dict(record or {})
        self.settings: RlSettings = stage.settings
        model.eval()  # no dropout in either pass: the ratio would measure it
        self.questions = Questions(samples, processor, base.dtype)
        self.held_out = None if eval_samples is None else Questions(eval_samples, processor, base.dtype)
        self.order = QuestionOrder(len(samples), self.settings.batch_size, self.settings.seed)
        steps = self.settings.max_steps or math.ceil(self.settings.epochs * self.order.steps_per_epoch)
        self.state = VisMemState(
            max_steps=steps, kl_coefficient=self.settings.kl, is_world_process_zero=accelerator.is_main_process
        )
        checkpoints = uses_checkpointing(self.settings, base.device.type == "cuda")
        self.accounts = Accounts(self.state, accelerator.num_processes, checkpoints, stage.forms_again)
        self.collector = Collector(model, processor, rewards, stage, self.accounts)
        self.update = Update(stage, accelerator, self.state, self.accounts, checkpoints)
        self.warm_start: WarmStartReport | None = None
        self.changed = 0

    @property
    def tokens_seen(self) -> int:
        """Positions trained on so far, by all processes."""
        return self.state.tokens_trained

    def begin(self, meter: Any, checkpoint: Path | None) -> None:
        """Count into this meter from here on."""
        self.accounts.meter = meter

    def told(self) -> dict[str, Any]:
        """What the report of a run tells beside what all reports tell."""
        stage = self.stage
        return {
            "stage": stage.name,
            "reference": stage.reference_name,
            "changed": self.changed,
            "warm_start": self.warm_start,
        }

    def train(self, resume_from_checkpoint: str | Path | None = None) -> None:
        """Take all steps that are left.

        Args:
            resume_from_checkpoint: one of this run's checkpoints to go on from.

        Raises:
            KeepsightError: if the checkpoint is of another run.
            TrainingDivergedError: if a loss or gradient is not finite.
            RewardError: naming a reward that does not return one finite number per completion.
        """
        trained = self.stage.trained()
        start = {name: digest(parameter) for name, parameter in trained.items()}
        settings, state = self.settings, self.state
        if settings.report_to:
            assert self.folder is not None
            plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in self.record.items()}
            self.accelerator.init_trackers(self.folder.name, config=plain)
        size = sum(parameter.numel() for parameter in trained.values())
        self.say(
            f"{state.max_steps} steps of {settings.batch_size} questions x {settings.group_size} trajectories; "
            f"{size:,} parameters are trained"
        )
        if resume_from_checkpoint is not None:
            self._resume(Path(resume_from_checkpoint))
        elif isinstance(settings, FormationSettings) and settings.warm_start_steps and self.stage.forms_again:
            self.warm_start = warm_up(self.model, self.questions, settings, self.say, self.accounts)
            self._save_checkpoint()
        self._same_everywhere(trained)
        while state.global_step < state.max_steps:
            self._take_step()
            if state.global_step % settings.save_steps == 0 or state.global_step == state.max_steps:
                self._save_checkpoint()
        if settings.report_to:
            self.accelerator.end_training()
        self.changed = sum(start[name] != digest(parameter) for name, parameter in trained.items())
        if state.is_world_process_zero:
            warn_of_no_signal(state.log_history, self.stage.invokes, self.folder)

    def evaluate(self) -> dict[str, float]:
        """Mean scores of the held-out questions: with memory, never invoking any, and without what stage II trained."""
        assert self.held_out is not None
        self.say(f"evaluating on {len(self.held_out):,} held-out questions")
        metrics = self._evaluate(self.held_out, self.stage.policy(1.0))
        if self.stage.invokes:
            metrics["eval_reward_without_memory"] = self._evaluate(self.held_out, NO_MEMORY)["eval_reward"]
        if self.stage.invokes and self.stage.changes_prompts:
            with without_policy(self.model):
                metrics["eval_reward_of_base"] = self._evaluate(self.held_out, NO_MEMORY)["eval_reward"]
        return metrics

    def _evaluate(self, questions: Questions, policy: MemoryPolicy) -> dict[str, float]:
        """Of one trajectory per question, from seeds of their own: the same for whatever is compared."""
        settings, means = self.settings, Means()
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
            scores, each = self.collector.score(asked, trajectories)
            means.add("eval_reward", scores)
            means.add("eval_invocations", [float(len(t.invocations)) for t in trajectories])
            for reward, column in zip(self.collector.rewards, each.T, strict=True):
                means.add(f"eval_rewards/{reward.__name__}/mean", column)
        return means.merged(self.accelerator)

    def save_model(self, output_dir: str | Path) -> None:
        """Write what was trained, and the processor, into a folder."""
        if self.save is not None and self.accelerator.is_main_process:
            self.save(Path(output_dir))

    # One step

    def _take_step(self) -> None:
        state = self.state
        started, tokens = time.perf_counter(), state.tokens_generated + state.tokens_trained
        values = self.step(state.global_step)
        seconds = time.perf_counter() - started
        state.global_step += 1
        if self.accounts.meter is not None:
            self.accounts.meter.steps += 1
        values["tokens_per_second"] = (state.tokens_generated + state.tokens_trained - tokens) / seconds
        if torch.cuda.is_available():
            values["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
        self._log(values)

    def step(self, step: int) -> dict[str, float]:
        """Step `step` (from 0), without logging; what it would log."""
        settings, means = self.settings, Means()
        self.update.set_rate(step)
        everyone = self.order.batch(step)
        places = range(self.accelerator.process_index, len(everyone), self.accelerator.num_processes)
        questions = [self.questions[everyone[place]] for place in places]
        seeds = [row_seed(settings.seed, step, place, copy) for place in places for copy in range(settings.group_size)]
        self.accounts.begin([question.inputs for question in questions])
        with _seeded(row_seed(settings.seed, step, "other draws")):
            rollout = self.collector.collect(questions, seeds, step / self.state.max_steps, means)
            values = self.update.take(rollout, len(everyone) * settings.group_size, means)
        nothing = (
            {"loss": 0.0, "kl": 0.0} if settings.kl else {"loss": 0.0}
        )  # where nothing depended on what is trained
        merged = nothing | means.merged(self.accelerator)
        if settings.kl:
            self.state.kl_coefficient = grpo.kl_coefficient(settings.kl, merged["kl"], settings.target_kl)
        return merged | values | {"kl_coefficient": self.state.kl_coefficient, "lr": self.update.rate}

    def _log(self, values: dict[str, float]) -> None:
        state = self.state
        values |= {"tokens_generated": state.tokens_generated, "tokens_trained": state.tokens_trained}
        if not (state.global_step in (1, state.max_steps) or state.global_step % self.settings.logging_steps == 0):
            return
        state.log_history.append({"step": state.global_step, **values})
        if not state.is_world_process_zero:
            return
        if self.folder is not None:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
        if self.settings.report_to:
            self.accelerator.log(values, step=state.global_step)
        if self.on_log is not None:
            self.on_log(dict(values), state.global_step, state.max_steps)

    # Checkpoints

    def _save_checkpoint(self) -> None:
        """Write `checkpoint-<step>`, which appears whole, and delete the oldest ones over the limit."""
        if self.accounts.meter is not None:
            self.accounts.meter.write()
        if self.folder is not None and self.state.is_world_process_zero:
            with new_folder(self.folder / f"checkpoint-{self.state.global_step}") as fresh:
                self.save_model(fresh)
                save_file(self.update.tensors(), fresh / TRAINED)
                self.state.save_to_json(str(fresh / STATE))
            output.keep_newest(self.folder, self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self, checkpoint: Path) -> None:
        try:
            tensors, before = load_file(checkpoint / TRAINED), VisMemState.read(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise KeepsightError(
                f"{checkpoint} cannot be resumed from ({type(error).__name__}: {error}). Delete it, and --resume takes "
                "the one before."
            ) from error
        self.update.restore(tensors)
        for name in ("global_step", "log_history", "kl_coefficient", "tokens_generated", "tokens_trained"):
            setattr(self.state, name, getattr(before, name))
        if self.folder is not None and self.state.is_world_process_zero:
            write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in self.state.log_history))

    @torch.no_grad()
    def _same_everywhere(self, trained: dict[str, torch.nn.Parameter]) -> None:
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for parameter in trained.values():
                parameter.copy_(broadcast(parameter.detach().clone(), 0))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What still draws from torch's own generator draws the same in every run, and leaves no trace."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
