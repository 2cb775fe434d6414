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
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from keepsight.checkpoints.atomic import write_text
from keepsight.checkpoints.sources import POLICY
from keepsight.data.check import CheckedData
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.run import output, preflight
from keepsight.train.run.accounting import CostMeter
from keepsight.train.run.checksums import changed, checksums
from keepsight.train.run.engines import Engine
from keepsight.train.run.flops import ModelShape, parameter_count
from keepsight.train.run.four_bit import load_base
from keepsight.train.run.learner import Learner
from keepsight.train.run.plan import MemoryPlan
from keepsight.train.run.report import TrainReport
from keepsight.train.run.settings import RunSettings
from keepsight.train.run.trainer import TrainingDivergedError

FROZEN = "keepsight_frozen.json"
"""Digests of all frozen tensors at the very start of a run, for the check at its end, resumed or not."""


Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True)
class Run(Generic[Loaded]):
    """A run that is about to start.

    A trainer is what transformers' Trainer is (`model`, `state`, `train`, `evaluate`, `save_model`), and knows more:
    `begin(meter, checkpoint)` before the first step, `tokens_seen`, and `told()`, what its report has beside the rest.

    Attributes:
        name: in cost.json and in reports.
        folder: gets everything.
        data: checked training data.
        record: what a resumed run must agree on.
        engine: what launched the processes.
        load: reads the weights, those of a checkpoint if there is one, and puts on them what is trained.
        build: what was loaded -> a trainer.
        card: trainer -> the README of the result.
        processor: saved with the result; None where the trainer saves its own.
        report: the class of the report.
        learns: whether anything is trained at all.
        evaluates: whether there is evaluation data.
        resume: go on from the last whole checkpoint.
        overwrite: move what is in the folder aside.
    """

    name: str
    folder: Path
    data: CheckedData
    record: dict[str, Any]
    engine: Engine
    load: Callable[[Path | None], Loaded]
    build: Callable[[Loaded], Any]
    card: Callable[[Any], str]
    processor: Any = None
    report: type[TrainReport] = TrainReport
    learns: bool = True
    evaluates: bool = False
    resume: bool = False
    overwrite: bool = False


def execute(run: Run, checkpoint: Path | None, say: preflight.Say) -> Any:
    """Load, train, evaluate, check, save.

    Args:
        run: what to do.
        checkpoint: where to go on from.
        say: receives lines for the user.

    Returns:
        A `run.report`.

    Raises:
        TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
        KeepsightError: if a frozen tensor changed.
    """
    folder, is_main = run.folder, run.engine.is_main
    loaded = run.load(checkpoint)
    if is_main:
        if run.overwrite and (moved := output.move_aside(folder)) is not None:
            say(f"{folder} held something; it is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        output.clear_halves(folder)
        output.write_record(folder, run.record)

    trainer = run.build(loaded)
    named = list(trainer.model.named_parameters())
    trained = {name for name, parameter in named if parameter.requires_grad}
    sizes = {name: parameter_count(parameter) for name, parameter in named}
    trainable = sum(sizes[name] for name in trained)
    shape = ModelShape.of(trainer.model)
    meter = CostMeter(folder, run.name, shape, trainable, run.resume and not run.overwrite)
    trainer.begin(meter, checkpoint)
    before = checksums(trainer.model, trained)
    if is_main and before is not None:
        before = _at_the_start(folder, before, checkpoint is not None)

    started = time.perf_counter()
    if run.learns:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        _check_finite(trainer.model)
    seconds = time.perf_counter() - started
    metrics = _numbers(trainer.evaluate()) if run.evaluates else {}
    after = checksums(trainer.model, trained)
    if is_main and before is not None and after is not None:
        _check_unchanged(before, after, folder)
    if run.learns:
        _save(trainer, run)
    state, resumed_from = trainer.state, None if checkpoint is None else output.step_of(checkpoint)
    meter.steps = state.global_step - (resumed_from or 0)
    logged = [entry for entry in state.log_history if entry.get("loss") is not None]
    report = run.report(
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
        data=run.data,
        metrics=metrics,
        cost=meter.write(),
        **trainer.told(),
    )
    trainer.model = trainer.model_wrapped = None  # a control may follow, and needs the room
    gc.collect()
    return report


def load_learner(
    base: str,
    learner: Learner,
    settings: RunSettings,
    plan: MemoryPlan,
    engine: Engine,
    checkpoint: Path | None = None,
) -> tuple[Any, Learner]:
    """A base with what is trained put on it, as a checkpoint has it if one is given; and what there is to learn on."""
    learner, trained_base = (learner, None) if checkpoint is None else learner.resumed(checkpoint)
    dtype, device = _dtype(learner, settings, plan, engine), preflight.base_device(settings, engine)
    model, _ = load_base(trained_base or base, base, settings, dtype, device)
    model.name_or_path = model.config.name_or_path = base
    return learner.put_on(model, settings.seed, autocast=engine.name != "zero3"), learner


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


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    speed = ("runtime", "per_second", "epoch", "num_tokens", "step_time")
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not any(part in name for part in speed)
    }


def _save(trainer: Any, run: Run) -> None:
    """Write everything into a hidden folder, then move it into place: no half-written file is ever seen."""
    folder, is_main = run.folder, run.engine.is_main
    temporary = (
        Path(tempfile.mkdtemp(prefix=output.SAVING, dir=folder)) if is_main else folder / f"{output.SAVING}other"
    )
    trainer.save_model(str(temporary))
    card = run.card(trainer)  # on all processes: it reads gates, which FSDP spreads over them
    if is_main:
        shutil.rmtree(temporary / "ref", ignore_errors=True)  # TRL's copy of the memory as it was, for a KL term
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, and checkpoints have it for resuming
        (temporary / "README.md").write_text(card)
        if run.processor is not None:
            run.processor.save_pretrained(temporary)
            if (temporary / POLICY / "config.json").is_file():
                run.processor.save_pretrained(temporary / POLICY)
        output.put_in_place(temporary, folder)
