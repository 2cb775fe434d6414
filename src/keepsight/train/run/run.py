"""One training run, from the first weight read to the last file written, whatever is trained and however.

Before it, `preflight` has made sure that nothing can go wrong that could have been known; after it, the folder holds
what `keepsight.load` reads, what the run cost, and the report says bit for bit whether anything changed that should not
have.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from keepsight.checkpoints.atomic import write_text
from keepsight.checkpoints.sources import POLICY
from keepsight.data.check import CheckedData
from keepsight.errors import KeepsightError
from keepsight.train.run import output
from keepsight.train.run.accounting import CostMeter
from keepsight.train.run.arguments import RunArguments
from keepsight.train.run.checksums import changed, checksums
from keepsight.train.run.controls import Comparison, Outcome
from keepsight.train.run.engines import Engine
from keepsight.train.run.flops import ModelShape, parameter_count
from keepsight.train.run.report import TrainReport
from keepsight.train.run.settings import CommonSettings
from keepsight.train.run.trainer import TrainingDivergedError

FROZEN = "keepsight_frozen.json"
"""Digests of all frozen tensors at the very start of a run, for the check at its end, resumed or not."""


Settings = TypeVar("Settings", bound=CommonSettings)


@dataclass(frozen=True, kw_only=True)
class TrainJob(ABC, Generic[Settings]):
    """A run that is about to start, or one of its controls. Each stage of a method is a subclass.

    A trainer is what transformers' Trainer is (`model`, `state`, `train`, `evaluate`, `save_model`), and knows more:
    `begin(meter, checkpoint)` before the first step, `tokens_seen`, and `told()`, what its report has beside the rest.

    Attributes:
        name: of the stage, or "control lora", ...
        base: the plain model.
        asked: data, folder, who listens.
        settings: of the stage.
        data: checked training data.
        held_out: checked data to evaluate on.
        checkpoint: where to go on from.
        processor: saved with the result; None where the trainer saves its own.
    """

    report: ClassVar[type[TrainReport]] = TrainReport

    name: str
    base: str
    asked: RunArguments
    settings: Settings
    data: CheckedData
    held_out: CheckedData | None
    checkpoint: Path | None
    processor: Any = None

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What a resumed run must agree on."""

    @abstractmethod
    def load(self) -> Any:
        """Read the weights, those of the checkpoint if there is one, and put on them what is trained."""

    @abstractmethod
    def trainer(self, loaded: Any) -> Any:
        """A trainer of what `load` returned."""

    @abstractmethod
    def card(self, trainer: Any) -> str:
        """The README of the result."""

    @property
    def engine(self) -> Engine:
        """What launched the processes."""
        return self.asked.engine

    @property
    def learns(self) -> bool:
        """Whether anything is trained at all."""
        return True

    @property
    def title(self) -> str:
        """In cost.json and in tables of costs."""
        return self.name

    def train(self) -> Any:
        """Load, train, evaluate, check, save.

        Returns:
            A `report`.

        Raises:
            TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
            KeepsightError: if a frozen tensor changed, or the run was started with other settings.
        """
        asked, folder, is_main, checkpoint = self.asked, self.asked.folder, self.engine.is_main, self.checkpoint
        record = self.record()
        if checkpoint is not None:
            output.check_record(folder, record)
        loaded = self.load()
        if is_main:
            if asked.overwrite and (moved := output.move_aside(folder)) is not None:
                asked.say(f"{folder} held something; it is now {moved}")
            folder.mkdir(parents=True, exist_ok=True)
            output.clear_halves(folder)
            output.write_record(folder, record)

        trainer = self.trainer(loaded)
        named = list(trainer.model.named_parameters())
        trained = {name for name, parameter in named if parameter.requires_grad}
        sizes = {name: parameter_count(parameter) for name, parameter in named}
        trainable = sum(sizes[name] for name in trained)
        shape = ModelShape.of(trainer.model)
        meter = CostMeter(folder, self.title, shape, trainable, asked.resume and not asked.overwrite)
        trainer.begin(meter, checkpoint)
        before = checksums(trainer.model, trained)
        if is_main and before is not None:
            before = _at_the_start(folder, before, checkpoint is not None)

        started = time.perf_counter()
        if self.learns:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            _check_finite(trainer.model)
        seconds = time.perf_counter() - started
        metrics = {}
        if self.held_out is not None:
            metrics = _numbers(_evaluated_now(trainer) or trainer.evaluate())
        after = checksums(trainer.model, trained)
        if is_main and before is not None and after is not None:
            _check_unchanged(before, after, folder)
        if self.learns:
            _save(trainer, self)
        state, resumed_from = trainer.state, None if checkpoint is None else output.step_of(checkpoint)
        meter.steps = state.global_step - (resumed_from or 0)
        logged = [entry for entry in state.log_history if entry.get("loss") is not None]
        report: Any = self.report(
            output_dir=folder,
            steps=state.global_step,
            resumed_from=resumed_from,
            trainable=trainable,
            frozen=sum(sizes.values()) - trainable,
            untouched=None if after is None else len(after),
            first=logged[0] if logged else {},
            last=logged[-1] if logged else {},
            tokens=trainer.tokens_seen,
            seconds=seconds,
            data=self.data,
            metrics=metrics,
            cost=meter.write(),
            **trainer.told(),
        )
        trainer.model = trainer.model_wrapped = None  # a control may follow, and needs the room
        gc.collect()
        return report

    def beside(self, report: Any, outcomes: Iterable[Outcome], note: str) -> Any:
        """The report of this run with that of its controls.

        Args:
            report: of this run.
            outcomes: of this run, then of its controls, which may be trained while this is read.
            note: what a reader of the comparison must know.
        """
        if not self.asked.controls:
            return report
        comparison = Comparison(tuple(outcomes), note)
        if self.engine.is_main:
            comparison.write(self.asked.folder)
        return replace(report, comparison=comparison)


def _at_the_start(folder: Path, now: dict[str, str], resumed: bool) -> dict[str, str]:
    """The digests at the very start of the run: read back where it was resumed, else written."""
    file = folder / FROZEN
    if resumed and file.is_file():
        try:
            recorded = json.loads(file.read_text())
        except ValueError:
            recorded = None
        if isinstance(recorded, dict) and recorded.keys() == now.keys():
            return recorded
    write_text(file, json.dumps(now))
    return now


def _check_finite(model: Any) -> None:
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise TrainingDivergedError(
            f"After the last step {len(broken)} tensors hold NaN or infinite values, such as {broken[0]}; nothing "
            "was saved. Earlier checkpoints stay. Try a lower learning rate."
        )


def _check_unchanged(before: dict[str, str], after: dict[str, str], folder: Path) -> None:
    wrong = changed(before, after)
    if wrong:
        raise KeepsightError(
            f"{len(wrong)} frozen tensors changed during training, such as {wrong[0]}, which must never happen; the "
            f"result was not saved. Please report this with the settings in {folder / output.RECORD}."
        )


def _evaluated_now(trainer: Any) -> dict[str, Any]:
    """What a trainer found that has evaluated after its last step already; empty if it has not."""
    history = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    if not history or history[-1].get("step") != trainer.state.global_step:
        return {}
    return {name: value for name, value in history[-1].items() if name.startswith("eval_")}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    speed = ("runtime", "per_second", "epoch", "num_tokens", "step_time")
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not any(part in name for part in speed)
    }


def _save(trainer: Any, job: TrainJob) -> None:
    """Write everything into a hidden folder, then move it into place: no half-written file is ever seen."""
    folder, is_main = job.asked.folder, job.engine.is_main
    temporary = (
        Path(tempfile.mkdtemp(prefix=output.SAVING, dir=folder)) if is_main else folder / f"{output.SAVING}other"
    )
    trainer.save_model(str(temporary))
    card = job.card(trainer)  # on all processes: it reads gates, which FSDP spreads over them
    if is_main:
        shutil.rmtree(temporary / "ref", ignore_errors=True)  # TRL's copy of the memory as it was, for a KL term
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, and checkpoints have it for resuming
        (temporary / "README.md").write_text(card)
        if job.processor is not None:
            job.processor.save_pretrained(temporary)
            if (temporary / POLICY / "config.json").is_file():
                job.processor.save_pretrained(temporary / POLICY)
        output.put_in_place(temporary, folder)
