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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from keepsight.card import names_base
from keepsight.checkpoints.atomic import write_text
from keepsight.checkpoints.sources import POLICY
from keepsight.data.check import CheckedData
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.run import output, preflight
from keepsight.train.run.accounting import CostMeter, RunCost
from keepsight.train.run.checksums import changed, checksums
from keepsight.train.run.engines import Engine
from keepsight.train.run.flops import ModelShape, parameter_count
from keepsight.train.run.four_bit import load_base
from keepsight.train.run.learner import Learner
from keepsight.train.run.monitor import gates_of
from keepsight.train.run.plan import MemoryPlan
from keepsight.train.run.settings import RunSettings
from keepsight.train.run.trainer import TrainingDivergedError

FROZEN = "keepsight_frozen.json"
"""Digests of all frozen tensors at the very start of a run, for the check at its end, resumed or not."""
_SAVING = ".saving-"


@dataclass(frozen=True)
class TrainReport:
    """What a run did, all measured in it.

    Attributes:
        output_dir: where the result is.
        steps: optimiser steps in all, those before a resume included.
        resumed_from: step of the checkpoint the run went on from, or None.
        trainable: trainable parameters.
        frozen: parameters of the base that were not trained.
        base_unchanged: no bit of any frozen tensor changed; None where weights are partitioned over processes.
        first_loss, last_loss: first and last logged training loss.
        gates: decoder layer -> final gate.
        tokens: tokens read in all steps.
        seconds: of the training loop in this run.
        data: what was checked, skipped and kept.
        first_reward, last_reward: first and last logged mean reward; None in supervised training.
        metrics: evaluation after the last step, where there is evaluation data: "eval_loss", "eval_reward", ...
        cost: of the run, its earlier sessions included.
        comparison: with its controls, where any were asked for (a `keepsight.train.run.controls.Comparison`).
    """

    output_dir: Path
    steps: int
    resumed_from: int | None
    trainable: int
    frozen: int
    base_unchanged: bool | None
    first_loss: float | None
    last_loss: float | None
    gates: dict[int, float]
    tokens: int
    seconds: float
    data: CheckedData
    first_reward: float | None = None
    last_reward: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    cost: RunCost | None = None
    comparison: Any = None


@dataclass(frozen=True)
class Run:
    """A run that is about to start.

    Attributes:
        name: in cost.json and in reports.
        base: the plain VLM that is trained, or that carries what is trained.
        learner: what is trained.
        folder: gets everything.
        settings: how to train.
        plan: the base on the meta device.
        data: checked training data.
        processor: saved with the result.
        record: what a resumed run must agree on.
        engine: what launched the processes.
        build: (model with what is learned on it, learner) -> a trainer.
        card: trainer -> the README of the result.
        evaluates: whether there is evaluation data.
        resume: go on from the last whole checkpoint.
        overwrite: move what is in the folder aside.
    """

    name: str
    base: str
    learner: Learner
    folder: Path
    settings: RunSettings
    plan: MemoryPlan
    data: CheckedData
    processor: Any
    record: dict[str, Any]
    engine: Engine
    build: Callable[[Any, Learner], Any]
    card: Callable[[Any], str]
    evaluates: bool = False
    resume: bool = False
    overwrite: bool = False


def execute(run: Run, checkpoint: Path | None, say: preflight.Say) -> TrainReport:
    """Load, train, check, save.

    Args:
        run: what to do.
        checkpoint: where to go on from.
        say: receives lines for the user.

    Raises:
        TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
        KeepsightError: if a frozen tensor changed.
    """
    folder, settings, is_main = run.folder, run.settings, run.engine.is_main
    learner, trained_base = (run.learner, None) if checkpoint is None else run.learner.resumed(checkpoint)
    dtype, device = _dtype(run), preflight.base_device(settings, run.engine)
    base, _ = load_base(trained_base or run.base, run.base, settings, dtype, device)
    base.name_or_path = base.config.name_or_path = str(run.base)
    model = learner.put_on(base, settings.seed, autocast=run.engine.name != "zero3")
    if is_main:
        if run.overwrite and (moved := output.move_aside(folder)) is not None:
            say(f"{folder} held something; it is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        for half in folder.glob(f"{_SAVING}*"):  # of a session that was killed while it saved the result
            shutil.rmtree(half, ignore_errors=True)
        output.write_record(folder, run.record)

    trainer = run.build(model, learner)
    named = list(trainer.model.named_parameters())
    trained = {name for name, parameter in named if parameter.requires_grad}
    trainable = sum(parameter_count(p) for name, p in named if name in trained)
    meter = CostMeter(folder, run.name, ModelShape.of(model), trainable, run.resume and not run.overwrite)
    trainer.setup.meter = meter
    if checkpoint is not None:
        trainer._total_train_tokens = _tokens_until(checkpoint)
        trainer.setup.first_step = int(checkpoint.name.rpartition("-")[2])
    before = checksums(trainer.model, trained)
    if is_main and before is not None:
        before = _at_the_start(folder, before, checkpoint is not None)

    started = time.perf_counter()
    if learner.learns:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    seconds = time.perf_counter() - started
    metrics = _numbers(trainer.evaluate()) if run.evaluates else {}
    after = checksums(trainer.model, trained)
    wrong = None if before is None or after is None else changed(before, after)
    if learner.learns:
        _save(trainer, run)
    meter.steps = trainer.state.global_step - trainer.setup.first_step
    cost = meter.write()
    if wrong and is_main:
        raise KeepsightError(
            f"{len(wrong)} frozen tensors changed during training, such as {wrong[0]}, which must never happen; what "
            f"was saved in {folder} does not fit the base as it was. Please report this with the settings in "
            f"{folder / output.RECORD}."
        )
    losses, rewards = _history(trainer, "loss"), _history(trainer, "reward")
    report = TrainReport(
        output_dir=folder,
        steps=trainer.state.global_step,
        resumed_from=None if checkpoint is None else trainer.setup.first_step,
        trainable=trainable,
        frozen=sum(parameter_count(p) for name, p in named if name not in trained),
        base_unchanged=None if wrong is None else not wrong,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        gates=gates_of(trainer.model),
        tokens=int(max(getattr(trainer, "_total_train_tokens", 0), trainer.state.num_input_tokens_seen)),
        seconds=seconds,
        data=run.data,
        first_reward=rewards[0] if rewards else None,
        last_reward=rewards[-1] if rewards else None,
        metrics=metrics,
        cost=cost,
    )
    trainer.model = trainer.model_wrapped = None  # a control may follow, and needs the room
    gc.collect()
    return report


def with_comparison(report: TrainReport, comparison: Any) -> TrainReport:
    """The report of a run beside its controls."""
    return replace(report, comparison=comparison)


def _dtype(run: Run) -> str:
    """A language model that is trained needs float32: updates of 1e-6 are lost in bfloat16's eight bits."""
    chosen = preflight.base_dtype(run.settings, run.plan)
    if run.learner.policy != "full" or run.engine.name.startswith("zero"):  # DeepSpeed keeps float32 copies itself
        return chosen
    if run.settings.dtype == "bfloat16":
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


def _history(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    speed = ("runtime", "per_second", "epoch", "num_tokens", "step_time")
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not any(part in name for part in speed)
    }


def _tokens_until(checkpoint: Path) -> int:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return int(max((entry.get("num_tokens", 0) for entry in history), default=0))


def _save(trainer: Any, run: Run) -> None:
    """Write everything into a hidden folder, then move it into place: no half-written file is ever seen."""
    broken = [name for name, p in trainer.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise TrainingDivergedError(
            f"After the last step {len(broken)} tensors hold NaN or infinite values, such as {broken[0]}; nothing "
            "was saved. Earlier checkpoints stay. Try a lower learning rate."
        )
    folder, is_main = run.folder, run.engine.is_main
    temporary = Path(tempfile.mkdtemp(prefix=_SAVING, dir=folder)) if is_main else folder / f"{_SAVING}other"
    trainer.save_model(str(temporary))
    card = run.card(trainer)  # on all processes: it reads gates, which FSDP spreads over them
    if is_main:
        shutil.rmtree(temporary / "ref", ignore_errors=True)  # TRL's copy of the memory as it was, for a KL term
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, and checkpoints have it for resuming
        (temporary / "README.md").write_text(card)
        run.processor.save_pretrained(temporary)
        if (temporary / POLICY / "config.json").is_file():
            run.processor.save_pretrained(temporary / POLICY)
        output.put_in_place(temporary, folder)


def memory_lines(trainer: Any) -> list[tuple[str, str]]:
    """Rows of a result's README that tell of its memory; none if it has none."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or config.peft_type != "PVM":
        return []
    gates = ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in gates_of(model).items())
    kind = "PVM" if config.branch == "memory" else "a parallel feed-forward branch, the control of PVM"
    return [
        ("method", f"{kind} (arXiv 2605.00814), {'causal' if config.causal else 'published'} rule"),
        ("layers", ", ".join(map(str, config.layers))),
        ("latent width", str(config.width)),
        ("gates", gates),
    ]


def base_lines(settings: RunSettings) -> list[tuple[str, str]]:
    """Rows of a result's README that tell how the base was held in training, where not as it is stored."""
    return [("base in training", "four bits (NF4), not in the paper")] if settings.load_in_4bit else []


def result_card(base: str, title: str, rows: list[tuple[str, str]], trainer: Any) -> str:
    """The README of a result, which is also its card on the hub."""
    count = sum(parameter_count(p) for p in trainer.model.parameters() if p.requires_grad)
    table = "\n".join(f"| {name} | {value} |" for name, value in [*rows, ("trained parameters", f"{count:,}")])
    library = "peft" if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config") else "transformers"
    return f"""---
{names_base(base)}library_name: {library}
tags: [keepsight, pvm, vision-language]
---

# {title}

Made with keepsight.

```python
import keepsight

model, processor = keepsight.load("this folder or its hub id")
```

| | |
|---|---|
{table}
"""
