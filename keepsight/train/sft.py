"""Teach a persistent visual memory on a frozen vision-language model: supervised fine-tuning through TRL.

The defaults are the paper's first stage (arXiv 2605.00814, section 5): only the memory learns, AdamW at 1e-4, cosine
with a tenth of warm-up, one epoch, cross-entropy on the answers. Two additions are keepsight's own and not in the
paper: the gates get a larger learning rate (they start at 0, and until they move nothing else learns), and, if asked
for, the blindfold warm-up (see `keepsight.train.blindfold`).
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from keepsight.adapters import find_adapter
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.loading import load, resolve_base
from keepsight.pvm import PvmConfig
from keepsight.train import output
from keepsight.train.blindfold import blindfold
from keepsight.train.collate import ConversationCollator
from keepsight.train.data import CheckedData, Policy, check_dataset, load_dataset_any, read_sample
from keepsight.train.plan import MemoryPlan, check_weights, plan_memory


class TrainingDivergedError(KeepsightError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class SftSettings:
    """How to train. Defaults are the paper's where it names them.

    Attributes:
        epochs: passes over the data. Ignored if `max_steps` is set.
        max_steps: optimiser steps.
        batch_size: samples per device and forward.
        grad_accum: forwards per optimiser step. The paper's global batch is 64 = 1 x 8 accumulation x 8 GPUs.
        lr: peak learning rate of everything but the gates.
        gate_lr_multiplier: the gates' learning rate is this times `lr` (keepsight's own addition).
        warmup_ratio: share of the steps over which the learning rate rises.
        scheduler: name of a transformers schedule.
        weight_decay: of matrices; never of gates and norms.
        max_grad_norm: gradients are clipped to this norm.
        max_length: longest sample in tokens; None for no limit.
        over_long: what to do with a longer one.
        text_only: what to do with a sample without an image.
        blindfold_steps: for so many first steps the frozen backbone's text cannot see the image (keepsight's own).
        bf16: autocast to bfloat16. None: on a GPU that has it.
        gradient_checkpointing: trade time for memory. None: on a GPU.
        dtype: of the base's weights; "auto" is the checkpoint's own.
        device: "cpu" or "cuda"; None: the GPU if there is one.
        seed: of initialisation and data order.
        logging_steps, save_steps, eval_steps: how often to log, to save a checkpoint, and to evaluate
            (None: as often as saving).
        keep_checkpoints: how many checkpoints to keep; None keeps all.
        workers: processes that read images.
        report_to: trackers, e.g. ["tensorboard"].
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 1
    grad_accum: int = 8
    lr: float = 1e-4
    gate_lr_multiplier: float = 10.0
    warmup_ratio: float = 0.1
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    over_long: Literal["error", "skip", "truncate"] = "error"
    text_only: Policy = "error"
    blindfold_steps: int = 0
    bf16: bool | None = None
    gradient_checkpointing: bool | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    logging_steps: int = 10
    save_steps: int = 200
    eval_steps: int | None = None
    keep_checkpoints: int | None = None
    workers: int = 0
    report_to: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "logging_steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number of at least 1.")
        for name in ("max_steps", "max_length", "eval_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected a whole number of at least 1, or leave it out.")
        for name in ("epochs", "lr", "gate_lr_multiplier", "max_grad_norm"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio}: expected a share of the steps, from 0 to below 1.")
        if self.blindfold_steps < 0 or self.workers < 0 or self.weight_decay < 0:
            raise ValueError("blindfold_steps, workers and weight_decay cannot be negative.")
        if self.over_long != "error" and self.max_length is None:
            warnings.warn(
                f"over_long={self.over_long!r} has no effect without max_length: no sample is too long.",
                KeepsightWarning,
                stacklevel=3,
            )


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
    settings, folder, is_main = settings or SftSettings(), Path(output_dir), int(os.environ.get("RANK", "0")) == 0
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

    model, _ = load(source, dtype=_dtype(settings, plan), device=_device(settings))
    if is_main:
        if overwrite and (moved := output.move_aside(folder)) is not None:
            say(f"{folder} held something; it is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        output.write_record(folder, record)

    trainer = _make_trainer(
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


def gates_of(model: torch.nn.Module) -> dict[int, float]:
    """Decoder layer -> value of the active memory's gate."""
    found = {}
    for name, parameter in model.named_parameters():
        if "pvm_blocks." in name and name.endswith(".gate"):
            found[int(name.partition(".layers.")[2].partition(".")[0])] = parameter.detach().float().item()
    return dict(sorted(found.items()))


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
    return "bfloat16" if _on_gpu(settings) and torch.cuda.is_bf16_supported() else "float32"


def _on_gpu(settings: SftSettings) -> bool:
    return settings.device != "cpu" and torch.cuda.is_available()


def _device(settings: SftSettings) -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if _on_gpu(settings) else "cpu"


# ------------------------------------------------------------------------------------------------------------ training


def _make_trainer(
    model: Any,
    processor: Any,
    pvm: PvmConfig | None,
    settings: SftSettings,
    folder: Path,
    data: CheckedData,
    eval_data: CheckedData | None,
    collator: ConversationCollator,
    on_log: Callable[[dict[str, float], int, int], None] | None,
    callbacks: list[Any],
) -> Any:
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class PvmTrainer(SFTTrainer):
        """TRL's trainer with a learning rate for the gates, the blindfold, and a stop at the first bad loss."""

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            optimizer = super().create_optimizer(*args, **kwargs)
            gates = [p for n, p in self.model.named_parameters() if n.endswith(".gate") and p.requires_grad]
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if all(p is not gate for gate in gates)]
            lr = settings.lr * settings.gate_lr_multiplier
            optimizer.add_param_group({"params": gates, "lr": lr, "weight_decay": 0.0})
            return optimizer

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            covered = self.state.global_step < settings.blindfold_steps
            with blindfold(self.accelerator.unwrap_model(model)) if covered else nullcontext():
                loss = super().training_step(model, *args, **kwargs)
            if not torch.isfinite(loss) and self.state.global_step == 0:
                raise TrainingDivergedError(
                    f"The loss is {loss.item()} at the very first step, before anything was learned: the base's "
                    "weights are damaged, or the dtype overflows (try --dtype float32)."
                )
            if not torch.isfinite(loss):
                raise TrainingDivergedError(
                    f"The loss became {loss.item()} at step {self.state.global_step + 1}; training has stopped. "
                    f"Checkpoints saved before are whole. Try a lower --lr (now {settings.lr:g}) or a smaller "
                    f"--gate-lr-multiplier (now {settings.gate_lr_multiplier:g}), and --resume or start anew."
                )
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs.update({f"gate/{layer}": value for layer, value in gates_of(self.model).items()})
            super().log(logs, *args, **kwargs)

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if on_log is not None and state.is_world_process_zero:
                on_log(dict(logs), state.global_step, state.max_steps)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # The last step, too; and every checkpoint, so that a resumed run knows the tokens so far.
            control.should_log |= control.should_save or state.global_step >= state.max_steps

    gpu = _on_gpu(settings)
    checkpointing = gpu if settings.gradient_checkpointing is None else settings.gradient_checkpointing
    # Newer transformers call it activation_checkpointing.
    renamed = "activation" if any(f.name == "activation_checkpointing" for f in fields(SFTConfig)) else "gradient"
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1, transformers 5 takes it as a share of the steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=(gpu and torch.cuda.is_bf16_supported()) if settings.bf16 is None else settings.bf16,
        **{
            f"{renamed}_checkpointing": checkpointing,
            f"{renamed}_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        },
        use_cpu=not gpu,
        ddp_find_unused_parameters=False,  # a memory without images gives gradients of zero, not none
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="no" if eval_data is None else "steps",
        eval_steps=None if eval_data is None else settings.eval_steps or settings.save_steps,
        report_to=list(settings.report_to) or "none",
        dataloader_num_workers=settings.workers,
        remove_unused_columns=False,
        max_length=None,  # the collator cuts, and the check has made sure of what it cuts
        disable_tqdm=True,
        label_names=["labels"],
    )
    collator = copy.copy(collator)
    collator.read = _Reader(data, eval_data)
    trainer = PvmTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=data.dataset,
        eval_dataset=None if eval_data is None else _Reader.marked(eval_data.dataset),
        processing_class=processor,
        peft_config=copy.deepcopy(pvm) if pvm is not None else PvmConfig(),
        callbacks=[Report(), *callbacks],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


@dataclass(frozen=True)
class _Reader:
    """Reads rows of the training and the evaluation data, each with its own source's images. Goes to workers."""

    data: CheckedData
    eval_data: CheckedData | None

    @staticmethod
    def marked(dataset: Any) -> Any:
        return dataset.add_column("is_eval", [True] * len(dataset))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        data = self.eval_data if row.get("is_eval") and self.eval_data is not None else self.data
        return read_sample(row, data.source)


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
        sums[name] = int(tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))
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
