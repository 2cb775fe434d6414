"""Teach a persistent visual memory on a frozen vision-language model: supervised fine-tuning through TRL.

The defaults are the paper's first stage (arXiv 2605.00814, section 5): only the memory learns, AdamW at 1e-4, cosine
with a tenth of warm-up, one epoch, cross-entropy on the answers. Two additions are keepsight's own and not in the
paper: the gates get a larger learning rate (they start at 0, and until they move nothing else learns), and, if asked
for, the blindfold warm-up (see `keepsight.train.blindfold`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from keepsight.adapters import find_adapter
from keepsight.bases import check_weights
from keepsight.errors import KeepsightError
from keepsight.loading import load
from keepsight.pvm import PvmConfig
from keepsight.shipped import resolve_base
from keepsight.train import output
from keepsight.train.blindfold import blindfold
from keepsight.train.collate import ConversationCollator
from keepsight.train.data import CheckedData, check_dataset, load_dataset_any
from keepsight.train.engines import Engine, check_engine, current_engine, whole
from keepsight.train.plan import MemoryPlan, plan_memory
from keepsight.train.settings import SftSettings
from keepsight.train.trainer import TrainingDivergedError, gates_of, make_trainer

__all__ = ["SftSettings", "TrainReport", "TrainingDivergedError", "train_pvm"]


@dataclass(frozen=True)
class TrainReport:
    """What a run did, all measured in it.

    Attributes:
        output_dir: where the adapter and its processor are.
        steps: optimiser steps in all, those before a resume included.
        resumed_from: step of the checkpoint the run went on from, or None.
        trainable: trainable parameters.
        frozen: parameters of the base.
        base_unchanged: no bit of any frozen tensor changed; None where weights are partitioned over processes.
        first_loss, last_loss: first and last logged training loss.
        gates: decoder layer -> final gate.
        tokens: tokens read in all steps.
        seconds: of the training loop in this run.
        data: what was checked, skipped and kept.
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


Say = Callable[[str], None]
"""Called with one line for the user."""


def _silent(line: str) -> None:
    """Say nothing."""


def train_pvm(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    pvm: PvmConfig | None = None,
    eval_dataset: Any = None,
    eval_split: str | None = None,
    settings: SftSettings | None = None,
    split: str = "train",
    resume: bool = False,
    overwrite: bool = False,
    check: Literal["full", "quick"] = "full",
    say: Say = _silent,
    on_log: Callable[[dict[str, float], int, int], None] | None = None,
    on_check: Callable[[int, int], None] | None = None,
    callbacks: list[Any] | None = None,
) -> TrainReport:
    """Train a visual memory on a frozen VLM and save it with its processor.

    Everything that can be wrong with data, settings and output folder is found before the weights are loaded.

    Args:
        source: the base VLM: a folder, a hub id, or "keepsight/reference". Recorded in the adapter as given.
        dataset: whatever `keepsight.train.data.load_dataset_any` reads.
        output_dir: gets checkpoints, and at the end the adapter and the processor, so that
            `keepsight.load(output_dir)` works.
        pvm: the memory; default: `PvmConfig()`.
        eval_dataset: data for the evaluation loss.
        settings: how to train.
        split: of hub datasets and saved DatasetDicts.
        eval_split: the same for `eval_dataset`; default: as `split`.
        resume: go on from the last whole checkpoint in `output_dir`, if there is one.
        overwrite: move what is in `output_dir` aside (nothing is deleted) and start anew.
        check: "full" decodes every image before training; "quick" only looks whether the files are there.
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)` at every logging step.
        on_check: called as `on_check(done, total)` while samples are checked.
        callbacks: further `transformers.TrainerCallback`s.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        TrainingDivergedError: if the loss becomes NaN or infinite; earlier checkpoints stay.
        ImportError: if the `train` extra is not installed.
    """
    _require_trl()
    settings, folder, engine = settings or SftSettings(), Path(output_dir), current_engine()
    is_main = engine.is_main
    if find_adapter(source) is not None:
        raise KeepsightError(
            f"{source} is an adapter. Training puts a new memory on a plain VLM: name the base model. To go on with an "
            "unfinished run: --resume."
        )
    if is_main:
        output.check_output(folder, resume, overwrite)
    plan = plan_memory(source, pvm)
    check_weights(source)
    _check_settings(settings)
    if settings.blindfold_steps:
        with blindfold(plan.backbone.model):  # raises where it cannot work
            pass
    checkpoint = _find_checkpoint(folder, say) if resume and not overwrite else None
    processor = _load_processor(source)
    collator = ConversationCollator(processor, max_length=settings.max_length)
    checked = _check_data(dataset, split, collator, settings, check, on_check)
    checked_eval = None
    if eval_dataset is not None:
        checked_eval = _check_data(eval_dataset, eval_split or split, collator, settings, check, None)
    check_engine(
        engine,
        "pvm",
        on_gpu=settings.on_gpu,
        text_only=checked.text_only + (checked_eval.text_only if checked_eval else 0),
        reentrant_works=plan.pvm.detach_visual,
        checkpointing=settings.checkpoints_gradients,
    )
    for where, why in checked.skipped[:5]:
        say(f"skipped {where}: {why}")
    if len(checked.skipped) > 5:
        say(f"skipped {len(checked.skipped)} samples in all")
    longest = f", the longest of {checked.longest} tokens" if checked.longest else ""
    cut = f", {checked.cut:,} with answers to be cut at {settings.max_length}" if checked.cut else ""
    say(f"{checked.rows:,} samples are good{longest}{cut}; loading {source}")
    record = _record(source, plan, settings, checked)
    if checkpoint is not None:
        output.check_record(folder, record)
    if is_main:
        there = len(list(folder.glob("checkpoint-*"))) if checkpoint is not None else 0
        _check_space(folder, plan, settings, checked, there)

    model, _ = load(source, dtype=_dtype(settings, plan), device=_device(settings, engine))
    if is_main:
        if overwrite and (moved := output.move_aside(folder)) is not None:
            say(f"{folder} held something; it is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        output.write_record(folder, record)

    trainer = make_trainer(
        model, processor, pvm, settings, folder, checked, checked_eval, collator, on_log, callbacks or []
    )
    if checkpoint is not None:
        trainer._total_train_tokens = _tokens_until(checkpoint)
    before = _checksum(trainer.model)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    seconds = time.perf_counter() - started
    unchanged = None if before is None else before == _checksum(trainer.model)
    _save(trainer, folder, is_main, _card(source, trainer, settings, checked))
    if unchanged is False:
        raise KeepsightError(
            f"Frozen tensors of the base changed during training, which must never happen; the adapter in {folder} "
            "does not fit the base as it was. Please report this with the settings in "
            f"{folder / output.RECORD}."
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    named = list(trainer.model.named_parameters())
    return TrainReport(
        output_dir=folder,
        steps=trainer.state.global_step,
        resumed_from=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        trainable=sum(p.numel() for _, p in named if p.requires_grad),
        frozen=sum(p.numel() for _, p in named if not p.requires_grad),
        base_unchanged=unchanged,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        gates=gates_of(trainer.model),
        tokens=int(trainer._total_train_tokens),
        seconds=seconds,
        data=checked,
    )


# ---------------------------------------------------------------------------------------------- before the model loads


def _require_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError('Training goes through TRL. Install it: pip install "keepsight[train]"') from error


def _check_settings(settings: SftSettings) -> None:
    from transformers import SchedulerType
    from transformers.integrations import get_available_reporting_integrations

    schedules = [schedule.value for schedule in SchedulerType]
    if settings.scheduler not in schedules:
        raise ValueError(f"scheduler={settings.scheduler!r}: expected one of {', '.join(schedules)}.")
    available = get_available_reporting_integrations()
    for tracker in settings.report_to:
        if tracker not in available:
            raise ValueError(
                f"report_to={tracker!r} is not installed (pip install {tracker}?). "
                f"Available: {', '.join(available) or 'none'}."
            )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no GPU.")


def _find_checkpoint(folder: Path, say: Say) -> Path | None:
    checkpoint, broken = output.last_checkpoint(folder)
    for why in broken:
        say(f"not resuming from {why}")
    if checkpoint is None:
        say(f"no checkpoint to resume from in {folder}; starting at step 0")
    else:
        say(f"resuming from {checkpoint}")
    return checkpoint


def _load_processor(source: str | Path) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(resolve_base(source))
    except (OSError, ValueError) as error:
        raise KeepsightError(
            f"{source}: its processor cannot be loaded ({' '.join(str(error).split())[:200]}). A VLM's folder holds "
            "processor_config.json (or preprocessor_config.json) and a tokenizer beside the weights."
        ) from error


def _check_data(
    dataset: Any,
    split: str,
    collator: ConversationCollator,
    settings: SftSettings,
    check: str,
    on_check: Callable[[int, int], None] | None,
) -> CheckedData:
    source = load_dataset_any(dataset, split)

    def measure(sample: dict[str, Any]) -> tuple[int, int]:
        from keepsight.train.images import open_image

        images = [open_image(image, source.folder) for image in sample["images"]]
        return collator.measure({"messages": sample["messages"], "images": images})

    def render(sample: dict[str, Any]) -> tuple[int, int]:
        collator.segments(sample["messages"])  # raises where the chat template cannot write this conversation
        return 0, 0

    return check_dataset(
        source,
        text_only=settings.text_only,
        decode=check == "full" and settings.max_length is None,  # measuring decodes
        measure=render if settings.max_length is None else measure,
        max_length=settings.max_length,
        over_long=settings.over_long,
        progress=on_check,
    )


def _record(source: str | Path, plan: MemoryPlan, settings: SftSettings, data: CheckedData) -> dict[str, Any]:
    free = {"logging_steps", "save_steps", "eval_steps", "keep_checkpoints", "workers", "report_to", "device"}
    memory = {f.name: getattr(plan.pvm, f.name) for f in fields(PvmConfig)}
    memory = {k: memory[k] for k in ("layers", "width", "ffn_width", "causal", "branch", "init_gate", "detach_visual")}
    chosen = {name: value for name, value in asdict(settings).items() if name not in free}
    return {"base": str(source), "samples": data.rows, **memory, **chosen}


def _check_space(folder: Path, plan: MemoryPlan, settings: SftSettings, data: CheckedData, there: int) -> None:
    """A checkpoint holds the memory and AdamW's two moments, in float32."""
    per_step = settings.batch_size * settings.grad_accum * int(os.environ.get("WORLD_SIZE", "1"))
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(data.rows / per_step))
    # One more than are kept: the oldest goes after the newest is written.
    number = min(math.ceil(steps / settings.save_steps), (settings.keep_checkpoints or steps) + 1) - there
    number = max(number, 0)
    needed = 4 * plan.memory_parameters * (3 * number + 1) + 2**20
    output.check_space(folder, needed, f"the run ({number} checkpoint{'s' * (number != 1)} and the adapter)")


def _dtype(settings: SftSettings, plan: MemoryPlan) -> str:
    """Float16 overflows in training; a float16 checkpoint is read as bfloat16 on a GPU and float32 on a CPU."""
    if settings.dtype != "auto":
        return settings.dtype
    stored = str(getattr(plan.backbone.model.config, "dtype", None)).removeprefix("torch.")
    if stored != "float16":
        return "auto"
    return "bfloat16" if settings.on_gpu and torch.cuda.is_bf16_supported() else "float32"


def _device(settings: SftSettings, engine: Engine) -> str:
    """Where the base is read to. Weights that will be sharded need not fit on one GPU."""
    on_gpu = settings.on_gpu and not engine.shards_weights
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"


# -------------------------------------------------------------------------------------------------- after the last step


def _tokens_until(checkpoint: Path) -> int:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return int(max((entry.get("num_tokens", 0) for entry in history), default=0))


def _checksum(model: torch.nn.Module) -> dict[str, int] | None:
    """Frozen tensor -> sum of its bits read as whole numbers. None if the weights are partitioned (ZeRO-3)."""
    sums = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.requires_grad or tensor.is_meta:
            continue
        if tensor.numel() == 0:
            return None
        sums[name] = int(whole(tensor).contiguous().view(torch.uint8).sum(dtype=torch.int64))
    return sums


def _card(source: str | Path, trainer: Any, settings: SftSettings, data: CheckedData) -> str:
    """The README of the adapter folder, which is also its card on the hub."""
    model, state = trainer.accelerator.unwrap_model(trainer.model), trainer.state
    pvm = model.peft_config["default"]
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    gates = ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in gates_of(model).items())
    rule = "causal" if pvm.causal else "published"
    loss = f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last" if losses else "not logged"
    return f"""---
base_model: {source}
library_name: peft
tags: [keepsight, pvm, vision-language]
---

# A persistent visual memory (PVM) for {source}

Made with keepsight; the base model is frozen and unchanged.

```python
import keepsight

model, processor = keepsight.load("this folder or its hub id")
```

| | |
|---|---|
| method | PVM (arXiv 2605.00814), {rule} rule |
| layers | {", ".join(map(str, pvm.layers))} |
| latent width | {pvm.width} |
| parameters | {sum(p.numel() for p in model.parameters() if p.requires_grad):,} |
| training | {state.global_step} steps on {data.rows:,} samples |
| peak learning rate | {settings.lr:g}, gates {settings.lr * settings.gate_lr_multiplier:g}; seed {settings.seed} |
| training loss | {loss} |
| blindfold warm-up | {settings.blindfold_steps} steps (not in the paper) |
| gates | {gates} |
"""


def _save(trainer: Any, folder: Path, is_main: bool, card: str) -> None:
    """Write adapter and processor beside each other, then move them into place: no half-written file is ever seen."""
    broken = [name for name, p in trainer.model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise TrainingDivergedError(
            f"After the last step {len(broken)} tensors hold NaN or infinite values, such as {broken[0]}; the adapter "
            "was not saved. Earlier checkpoints stay. Try a lower learning rate."
        )
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder)) if is_main else folder / ".saving-other"
    trainer.save_model(str(temporary))
    if is_main:
        (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle, and checkpoints have it for resuming
        (temporary / "README.md").write_text(card)
        output.put_in_place(temporary, folder)
