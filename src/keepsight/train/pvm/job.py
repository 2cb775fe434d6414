"""Training jobs of PVM: load a base with what is trained on it, and train the controls beside it.

A stage says how its trainer is built, how many steps an epoch has, how its controls differ and what its result's card
tells; everything else is the same for supervised training and for reinforcement learning.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Generic, TypeVar

from keepsight.data.check import CheckedData
from keepsight.errors import KeepsightWarning
from keepsight.pvm import PvmConfig
from keepsight.train.run import preflight
from keepsight.train.run.controls import WHAT, Control, Outcome
from keepsight.train.run.engines import Engine, check_engine
from keepsight.train.run.four_bit import load_base
from keepsight.train.run.learner import Learner, lora_size
from keepsight.train.run.plan import MemoryPlan
from keepsight.train.run.report import TrainReport, base_lines, result_card
from keepsight.train.run.run import TrainJob
from keepsight.train.run.settings import RunSettings

Settings = TypeVar("Settings", bound=RunSettings)


@dataclass(frozen=True, kw_only=True)
class PvmJob(TrainJob[Settings], Generic[Settings]):
    """A stage that is about to be trained, or one of its controls; see `TrainJob`.

    Attributes:
        learner: what is trained.
        plan: the base and the memory, worked out before any weight is read.
        callbacks: further transformers callbacks.
    """

    stage: ClassVar[str]

    learner: Learner
    plan: MemoryPlan
    callbacks: list[Any]

    @abstractmethod
    def samples(self) -> dict[str, Any]:
        """What of base and data a resumed run must agree on."""

    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a pass over the data."""

    @abstractmethod
    def told(self, trainer: Any) -> list[tuple[str, str]]:
        """Rows of the result's card."""

    @abstractmethod
    def control_settings(self, control: Control) -> Settings:
        """How a control is trained."""

    def control_base(self, control: Control) -> str:
        """What a control starts on."""
        return self.base

    @property
    def learns(self) -> bool:
        """Whether anything is trained at all."""
        return self.learner.learns

    def record(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        return {**self.samples(), **_learner_record(self.learner, self.plan), **_record_of(self.settings)}

    def load(self) -> tuple[Any, Learner]:
        """A base with what is trained put on it, and what there is to learn on."""
        settings, engine, learner, trained_base = self.settings, self.engine, self.learner, None
        if engine.is_main and learner.learns:
            self._check_space()
        if self.checkpoint is not None:
            learner, trained_base = learner.resumed(self.checkpoint)
        dtype, device = _dtype(learner, settings, self.plan, engine), preflight.base_device(settings, engine)
        model, _ = load_base(trained_base or self.base, self.base, settings, dtype, device)
        model.name_or_path = model.config.name_or_path = self.base
        return learner.put_on(model, settings.seed, autocast=engine.name != "zero3"), learner

    def _check_space(self) -> None:
        steps = preflight.total_steps(self.settings, self.steps_per_epoch())
        folder = self.asked.folder
        there = len(list(folder.glob("checkpoint-*"))) if self.checkpoint is not None else 0
        preflight.check_space(folder, *_sizes(self.learner, self.plan), steps, self.settings, there)

    def with_controls(self, what: str, controls: Sequence[tuple[Control, Learner]], note: str) -> TrainReport:
        """Train; then train the controls, and set them beside the memory.

        Args:
            what: this run trains, in words, "the memory" first.
            controls: each with what it trains.
            note: what a reader of the comparison must know.
        """
        report = self.train()

        def outcomes() -> Iterator[Outcome]:
            yield Outcome.of(self.name, what, report, self.settings.lr)
            for control, learner in controls:
                asked = self.asked.of_control(control)
                job = replace(
                    self,
                    name=f"control {control.name}",
                    base=self.control_base(control),
                    asked=asked,
                    learner=learner,
                    settings=self.control_settings(control),
                    checkpoint=asked.checkpoint() if learner.learns else None,
                )
                self.asked.say(f"{job.name} in {asked.folder}, from {job.base}")
                told = what.replace("the memory", WHAT["mlp"], 1) if control.name == "mlp" else WHAT[control.name]
                yield Outcome.of(control.name, told, job.train(), job.settings.lr)

        note = f"{note} Same data, order of data, steps and seed ({self.settings.seed}) for all."
        return self.beside(report, outcomes(), note)

    def card(self, trainer: Any) -> str:
        """The README of the result."""
        memory = "A persistent visual memory (PVM)"
        title = memory if self.name == self.stage else f"The {self.name} of a visual memory"
        return result_card(
            self.base, f"{title} for {self.base}", [*self.told(trainer), *base_lines(self.settings)], trainer
        )


def _dtype(learner: Learner, settings: RunSettings, plan: MemoryPlan, engine: Engine) -> str:
    """A language model that is trained needs float32: updates of 1e-6 are lost in bfloat16's eight bits."""
    chosen = preflight.base_dtype(settings, plan)
    if learner.policy != "full" or engine.name.startswith("zero"):  # DeepSpeed keeps float32 copies itself
        return chosen
    if settings.dtype == "bfloat16":
        warnings.warn(
            "--dtype bfloat16 with a language model that is trained as a whole: most updates are smaller than its "
            "eight bits can show, and are lost. Leave --dtype out; matrices are multiplied in bfloat16 all the same.",
            KeepsightWarning,
            stacklevel=2,
        )
        return chosen
    return "float32"


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
        return "causal rule: text reads the images before it. vLLM can serve this memory, of families that it knows"
    return "published rule: text before an image reads it, too. vLLM cannot serve this memory; keepsight serve can"


def _record_of(settings: RunSettings) -> dict[str, Any]:
    """The settings that a resumed run must agree on."""
    free = {
        "logging_steps",
        "save_steps",
        "eval_steps",
        "keep_checkpoints",
        "workers",
        "report_to",
        "device",
        "keep_language",
    }
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
