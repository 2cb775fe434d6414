"""What both stages of PVM have around their trainers: a run, what a resumed run must agree on, controls beside it.

A stage says how its trainer is built, how many steps an epoch has, how its controls differ and what its result's card
tells; everything else is the same for supervised training and for reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from keepsight.data.check import CheckedData
from keepsight.pvm import PvmConfig
from keepsight.train.run import output, preflight
from keepsight.train.run.controls import WHAT, Comparison, Control, Outcome, control_folder
from keepsight.train.run.engines import Engine, check_engine
from keepsight.train.run.learner import Learner, lora_size
from keepsight.train.run.plan import MemoryPlan
from keepsight.train.run.report import TrainReport, base_lines, result_card
from keepsight.train.run.run import Run, execute, load_learner
from keepsight.train.run.settings import RunSettings
from keepsight.train.run.trainer import OnLog

Settings = TypeVar("Settings", bound=RunSettings)


@dataclass(frozen=True, kw_only=True)
class PvmJob(Generic[Settings]):
    """A stage that is about to be trained, or one of its controls.

    Attributes:
        name: "pvm", "pvm-grpo", "control lora", ...
        base: what the model is read from.
        learner: what is trained.
        plan: the base and the memory, worked out before any weight is read.
        settings: of the stage.
        folder: gets everything.
        data: checked training data.
        held_out: checked data to evaluate on.
        processor: of the base.
        engine: what launched the processes.
        checkpoint: where to go on from.
        resume, overwrite: what to do with what is in the folder.
        say, on_log, callbacks: who listens.
    """

    stage: ClassVar[str]

    name: str
    base: str
    learner: Learner
    plan: MemoryPlan
    settings: Settings
    folder: Path
    data: CheckedData
    held_out: CheckedData | None
    processor: Any
    engine: Engine
    checkpoint: Path | None
    resume: bool
    overwrite: bool
    say: preflight.Say
    on_log: OnLog | None
    callbacks: list[Any]

    def trainer(self, model: Any, learner: Learner) -> Any:
        """A trainer of `model`, on which `learner` has put what is trained."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What a resumed run must agree on, besides what is trained and how."""
        raise NotImplementedError

    def steps_per_epoch(self) -> int:
        """Optimiser steps of a pass over the data."""
        raise NotImplementedError

    def told(self, trainer: Any) -> list[tuple[str, str]]:
        """Rows of the result's card."""
        raise NotImplementedError

    def control_settings(self, control: Control) -> Settings:
        """How a control is trained."""
        raise NotImplementedError

    def control_base(self, control: Control) -> str:
        """What a control starts on."""
        return self.base

    def train(self) -> TrainReport:
        """Load, train, evaluate, save."""
        record = {**self.record(), **_learner_record(self.learner, self.plan), **_record_of(self.settings)}
        if self.checkpoint is not None:
            output.check_record(self.folder, record)
        if self.engine.is_main and self.learner.learns:
            steps = preflight.total_steps(self.settings, self.steps_per_epoch())
            there = len(list(self.folder.glob("checkpoint-*"))) if self.checkpoint is not None else 0
            preflight.check_space(self.folder, *_sizes(self.learner, self.plan), steps, self.settings, there)
        run = Run(
            name=self.name,
            folder=self.folder,
            data=self.data,
            processor=self.processor,
            record=record,
            engine=self.engine,
            load=partial(load_learner, self.base, self.learner, self.settings, self.plan, self.engine),
            build=lambda loaded: self.trainer(*loaded),
            card=self._card,
            learns=self.learner.learns,
            evaluates=self.held_out is not None,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        return execute(run, self.checkpoint, self.say)

    def of_control(self, control: Control, learner: Learner) -> PvmJob[Settings]:
        """The run of a control, in a folder of its own."""
        folder = control_folder(self.folder, control)
        return replace(
            self,
            name=f"control {control.name}",
            base=self.control_base(control),
            learner=learner,
            settings=self.control_settings(control),
            folder=folder,
            checkpoint=output.last_checkpoint(folder)[0] if self.resume and learner.learns else None,
            overwrite=False,
        )

    def beside(
        self, report: TrainReport, what: str, controls: Sequence[tuple[Control, Learner]], note: str
    ) -> TrainReport:
        """Train the controls, and set them beside the memory.

        Args:
            report: of the memory's run.
            what: what the memory's run trained, in words, "the memory" first.
            controls: each with what it trains.
            note: what a reader of the comparison must know.
        """
        if not controls:
            return report
        outcomes = [Outcome.of(self.name, what, report, self.settings.lr)]
        for control, learner in controls:
            job = self.of_control(control, learner)
            self.say(f"{job.name} in {job.folder}, from {job.base}")
            told = what.replace("the memory", WHAT["mlp"], 1) if control.name == "mlp" else WHAT[control.name]
            outcomes.append(Outcome.of(control.name, told, job.train(), job.settings.lr))
        comparison = Comparison(
            tuple(outcomes), f"{note} Same data, order of data, steps and seed ({self.settings.seed}) for all."
        )
        if self.engine.is_main:
            comparison.write(self.folder)
        return replace(report, comparison=comparison)

    def _card(self, trainer: Any) -> str:
        memory = "A persistent visual memory (PVM)"
        title = memory if self.name == self.stage else f"The {self.name} of a visual memory"
        return result_card(
            self.base, f"{title} for {self.base}", [*self.told(trainer), *base_lines(self.settings)], trainer
        )


def check_pvm_engine(
    engine: Engine, settings: RunSettings, plan: MemoryPlan, data: CheckedData, held_out: CheckedData | None
) -> None:
    """Refuse an engine that cannot train a PVM with these settings and data."""
    check_engine(
        engine,
        "pvm",
        on_gpu=settings.on_gpu,
        text_only=data.text_only + (held_out.text_only if held_out else 0),
        reentrant_works=plan.pvm.detach_visual,
        checkpointing=settings.checkpoints_gradients,
    )


def about_rule(pvm: PvmConfig) -> str:
    """What a memory's rule means for serving it."""
    if pvm.causal:
        return "causal rule: text reads the images before it. vLLM can serve this memory (keepsight export vllm)"
    return "published rule: text before an image reads it, too. vLLM cannot serve this memory; keepsight serve can"


def _record_of(settings: RunSettings) -> dict[str, Any]:
    """The settings that a resumed run must agree on."""
    free = {"logging_steps", "save_steps", "eval_steps", "keep_checkpoints", "workers", "report_to", "device"}
    return {name: value for name, value in asdict(settings).items() if name not in free}


def _learner_record(learner: Learner, plan: MemoryPlan) -> dict[str, Any]:
    """The fields of what is trained that a resumed run must agree on."""
    kept = ("layers", "width", "ffn_width", "causal", "branch", "init_gate", "detach_visual")
    memory = {f.name: getattr(plan.pvm, f.name) for f in fields(PvmConfig) if f.name in kept}
    if learner.memory is None:
        memory = {}
    elif learner.memory.branch != plan.pvm.branch:
        memory["branch"] = learner.memory.branch
    found: dict[str, Any] = memory if learner.policy == "none" else {**memory, "policy": learner.policy}
    if learner.lora is not None and learner.policy == "lora":
        found["rank"] = learner.lora.r
    return found


def _sizes(learner: Learner, plan: MemoryPlan) -> tuple[int, int]:
    """(trained parameters, parameters that every checkpoint holds), before anything is loaded."""
    backbone, memory = plan.backbone, plan.memory_parameters if learner.memory is not None else 0
    if learner.policy == "full":
        parts = [*backbone.decoder.parameters(), *backbone.model.get_output_embeddings().parameters()]
        language = sum({id(p): p.numel() for p in parts}.values())
        return memory + language, memory + plan.base_parameters
    if learner.policy == "lora" and learner.lora is not None:
        extra = lora_size(backbone, learner.lora)
        return memory + extra, memory + extra
    return memory, memory
