"""Training jobs of VisMem's stages, with their controls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftConfig

from keepsight.train.rewards.rewards import Reward
from keepsight.train.run import preflight
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import WHAT, Control, Outcome, control_folder
from keepsight.train.run.report import TrainReport, base_lines, mix_lines, result_card
from keepsight.train.run.run import TrainJob
from keepsight.train.vismem.loading import LoadedStage, load_control, plan_vismem
from keepsight.train.vismem.prompts import CheckedSamples
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings, RlSettings
from keepsight.train.vismem.trainer import VisMemTrainer
from keepsight.train.vismem.warm_start import WarmStartReport
from keepsight.vismem import VisMemBranch, VisMemConfig


@dataclass(frozen=True, kw_only=True)
class VisMemReport(TrainReport):
    """What a stage did, all measured in it.

    Attributes:
        stage: "formation" or "invocation".
        reference: what the KL penalty is measured against.
        changed: trained tensors that changed.
        warm_start: what the warm start did, or None.
    """

    stage: str
    reference: str
    changed: int
    warm_start: WarmStartReport | None = None

    @property
    def tokens_generated(self) -> int:
        """Positions written in rollouts, memories included."""
        return int(self.last.get("tokens_generated", 0))

    @property
    def tokens_trained(self) -> int:
        """Positions that gradients went through."""
        return int(self.last.get("tokens_trained", 0))


@dataclass(frozen=True, kw_only=True)
class StageJob(TrainJob[RlSettings]):
    """A stage that is about to be trained, or one of its controls; see `TrainJob`.

    Attributes:
        source: where the model comes from.
        config: of the memory; None for a control.
        rewards: what is scored.
        start: reads the weights.
        parameters: of a control: how many a LoRA is to match.
    """

    report = VisMemReport

    source: str
    config: VisMemConfig | None
    rewards: list[Reward]
    start: Callable[[], LoadedStage]
    parameters: int | None = None

    @property
    def title(self) -> str:
        """In cost.json and in tables of costs."""
        return f"vismem {self.name}"

    def load(self) -> LoadedStage:
        """The model with what is trained on it; a checkpoint is read by the trainer."""
        found = self.start()
        if self.engine.is_main:
            self._check_space(found)
        return found

    def train(self) -> VisMemReport:
        """Load, train, evaluate, check, save."""
        report: VisMemReport = super().train()
        self.asked.say(
            f"{report.changed} trained tensors changed; no bit of any of the other {report.untouched} did (digests "
            "before and after)"
        )
        return report

    def with_controls(self) -> VisMemReport:
        """Train; then train the controls, and set them beside the memory."""
        report, held = self.train(), self.held_out
        about = "no questions were held out" if held is None else f"evaluated on {held.rows:,} held-out questions"
        note = (
            f"The same questions, steps and seeds, GRPO for all; {about}, one sampled answer each, from the same "
            "seeds. Controls are rewarded by the score itself: without a memory there is no gain from one."
        )
        if self.name == "invocation":
            note += (
                " They go on from those of the same name beside stage I, where there are some; else they start from "
                "the base and have stage II's steps alone."
            )
        return self.beside(report, self._outcomes(report), note)

    def _outcomes(self, report: VisMemReport) -> Iterator[Outcome]:
        words = {"formation": "the memory, invoked at random", "invocation": "the memory, invoked by the model"}
        yield _outcome("vismem", words[self.name], report, self.settings.lr)
        _, parameters = plan_vismem(self.base, self.config)
        for control in self.asked.controls:
            if control.name == "none":
                yield _untrained(report)
                continue
            asked, source = self.asked.of_control(control), self._start(control)
            settings = replace(self.settings, lr=control.rate(self.settings.lr))
            job = replace(
                self,
                name=f"control {control.name}",
                source=source,
                config=None,
                asked=asked,
                settings=settings,
                start=partial(load_control, source, self.base, control, parameters, settings, asked.say),
                parameters=parameters,
                checkpoint=asked.checkpoint(),
            )
            asked.say(f"{job.name} in {asked.folder}, from {source}")
            yield _outcome(control.name, WHAT[control.name], job.train(), settings.lr)

    def _start(self, control: Control) -> str:
        """Where a control starts: where its own stage I left it, if that is beside the memory's; else at the base."""
        before = control_folder(Path(self.source), control)
        kept = "config.json" if control.name == "sft" else "adapter_config.json"
        return str(before) if (before / kept).is_file() else self.base

    def record(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        free = {"logging_steps", "save_steps", "keep_checkpoints", "report_to", "device", "rows_per_rollout"}
        general = {f.name for f in fields(PeftConfig)} | {"token_ids", "delimiter_ids"}
        names = [f.name for f in fields(VisMemConfig) if f.name not in general and not f.name.startswith("base_")]
        return {
            "stage": self.name,
            "base": self.source,
            "samples": self.data.rows,
            **self.data.agreed(),
            "rewards": [f"{reward.name}={reward.weight:g}" for reward in self.rewards],
            **({} if self.config is None else {name: getattr(self.config, name) for name in names}),
            **({} if self.parameters is None else {"parameters": self.parameters}),
            **{name: value for name, value in asdict(self.settings).items() if name not in free},
        }

    def _check_space(self, loaded: LoadedStage) -> None:
        """A checkpoint holds the memory, and the trained tensors with AdamW's two moments, in float32."""
        settings = self.settings
        steps = preflight.total_steps(settings, math.ceil(self.data.rows / settings.batch_size))
        trained = sum(p.numel() for p in loaded.stage.trained().values())
        memory = sum(p.numel() for p in loaded.stage.memory.parameters())
        folder = self.asked.folder
        there = len(list(folder.glob("checkpoint-*"))) if self.asked.resume else 0
        preflight.check_space(folder, trained, memory + trained, steps, settings, there)

    def trainer(self, loaded: LoadedStage) -> VisMemTrainer:
        """A trainer of what was loaded."""
        from accelerate import Accelerator

        trackers, folder = list(self.settings.report_to) or None, self.asked.folder
        return VisMemTrainer(
            loaded.model,
            loaded.processor,
            CheckedSamples(self.data),
            self.rewards,
            loaded.stage,
            eval_samples=None if self.held_out is None else CheckedSamples(self.held_out),
            folder=folder,
            save=loaded.save,
            accelerator=Accelerator(cpu=not self.settings.on_gpu, log_with=trackers, project_dir=str(folder)),
            on_log=self.asked.on_log,
            say=self.asked.say,
            record=self.record(),
        )

    def card(self, trainer: VisMemTrainer) -> str:
        """The README of the result."""
        settings, stage, state, config = self.settings, trainer.stage, trainer.state, self.config
        first, last = (line.get("reward", math.nan) for line in (state.log_history[0], state.log_history[-1]))
        rows = [
            (
                "training",
                f"{state.global_step} steps, {settings.batch_size} prompts x {settings.group_size} trajectories",
            ),
            *mix_lines(self.data),
            ("rewards", ", ".join(f"{reward.weight:g} x {reward.name}" for reward in self.rewards)),
            ("mean reward", f"{first:.4f} at first, {last:.4f} at last"),
            ("KL against", stage.reference_name),
            ("peak learning rate", f"{settings.lr:g}; seed {settings.seed}"),
            *base_lines(settings),
        ]
        if config is None:
            library = "transformers" if self.name == "control sft" else "peft"
            title = f"The {self.name} of a latent vision memory"
            return result_card(self.base, title, rows, trainer, "keepsight, vision-language", library)
        sizes = VisMemBranch.of(trainer.model).config
        rows = [
            ("method", "VisMem (arXiv 2511.11007)"),
            ("K, N_s, N_l", f"{sizes.num_queries}, {sizes.num_short}, {sizes.num_long}"),
            *rows,
        ]
        if isinstance(settings, FormationSettings):
            rows.append(("warm start (ours, not in the paper)", f"{settings.warm_start_steps} steps"))
        if isinstance(settings, InvocationSettings):
            rows.append(("invocation cost (ours; the paper's is 0)", f"{settings.invocation_cost:g}"))
        title = f"A latent vision memory (VisMem), {stage.title}"
        return result_card(self.base, title, rows, trainer, "keepsight, vismem, vision-language")


def _outcome(name: str, what: str, report: VisMemReport, lr: float) -> Outcome:
    """As a row of a comparison, where a policy's loss, which is 0 on average, says nothing."""
    return replace(Outcome.of(name, what, report, lr), first_loss=None, last_loss=None)


def _untrained(report: VisMemReport) -> Outcome:
    """The base as it is: the run's own model, never invoking, and without a LoRA that stage II has trained on it."""
    found = report.metrics.get("eval_reward_of_base", report.metrics.get("eval_reward_without_memory"))
    return Outcome(
        "none", WHAT["none"], metrics=None if found is None else {"eval_reward": found}, cost=RunCost(name="none")
    )
