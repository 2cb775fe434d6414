"""One run of VisMem's training, from checked data to saved files: the same for both stages and for their controls."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.data.check import CheckedData, read_sample
from keepsight.errors import KeepsightWarning
from keepsight.train.run import output
from keepsight.train.run.accounting import CostMeter
from keepsight.train.run.checksums import checksums
from keepsight.train.run.flops import ModelShape
from keepsight.train.run.four_bit import load_base
from keepsight.train.run.preflight import Say, find_checkpoint
from keepsight.train.vismem.asked import Run
from keepsight.train.vismem.proof import Only, prove
from keepsight.train.vismem.report import VisMemReport, card
from keepsight.train.vismem.rollout import NO_MEMORY
from keepsight.train.vismem.saving import (
    Save,
    append_metrics,
    clear_halves,
    cut_metrics,
    restore,
    save_checkpoint,
    save_final,
    warn_of_no_signal,
)
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings, RlSettings
from keepsight.train.vismem.stage import Stage
from keepsight.train.vismem.stages import without_policy
from keepsight.train.vismem.trainer import VisMemTrainer
from keepsight.train.vismem.warm import warm_up
from keepsight.vismem import VisMemBranch


@dataclass(frozen=True)
class Made:
    """A model to train.

    Attributes:
        model: carries VisMem (which a control never invokes).
        processor: with the memory's tokens.
        stage: what is trained.
        save: writes what was trained, and the processor, into a folder.
    """

    model: Any
    processor: Any
    stage: Stage
    save: Save


def load_here(source: str | Path, base: str | Path, settings: RlSettings, trainable: bool = False) -> tuple[Any, Any]:
    """(model, processor) of a base, or of an adapter on it, where this process trains."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if settings.on_gpu else "cpu"
    return load_base(source, base, settings, settings.dtype, device, trainable)


def ready(model: Any, say: Say) -> Any:
    """The model with its memory in float32, its base in a dtype to train in."""
    base = Backbone.of(model).model
    if base.dtype == torch.float16:
        better = torch.bfloat16 if base.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        base.to(better)
        say(f"the base is stored in float16, which overflows in training; it is used in {better}".replace("torch.", ""))
    VisMemBranch.of(model).active.float()
    return model


def warn_untrained(model: Any, settings: RlSettings) -> None:
    """Warn of a stage II on a memory that stage I has not formed."""
    if isinstance(settings, InvocationSettings) and VisMemBranch.of(model).active.short_bank.is_untrained:
        warnings.warn(
            "The memory of this adapter was never trained: stage II would learn when to invoke noise. Run stage I "
            "(keepsight train vismem-formation) first.",
            KeepsightWarning,
            stacklevel=2,
        )


class _Samples:
    """Checked data as the trainer reads them."""

    def __init__(self, data: CheckedData):
        self.data = data

    def __len__(self) -> int:
        return self.data.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_sample(self.data.dataset[index], self.data.source)


def execute(
    run: Run,
    name: str,
    record: dict[str, Any],
    data: CheckedData,
    held_out: CheckedData | None,
    make: Callable[[], Made],
) -> VisMemReport:
    """Load the model, train, compare digests, save, evaluate.

    Args:
        run: what was asked for.
        name: of the run, in its accounts.
        record: what must be the same for a run to be resumed.
        data: checked questions.
        held_out: questions to evaluate on, or None.
        make: loads the model; called after everything is checked.
    """
    from accelerate import Accelerator

    settings, folder, say = run.settings, run.folder, run.say
    checkpoint = find_checkpoint(folder, say) if run.resume else None
    if checkpoint is not None:
        output.check_record(folder, record)
    made = make()
    model, stage = made.model, made.stage
    accelerator = Accelerator(
        cpu=not settings.on_gpu, log_with=list(settings.report_to) or None, project_dir=str(folder)
    )
    trained = stage.trained()
    if run.is_main:
        _check_space(folder, settings, data, list(trained.values()), VisMemBranch.of(model))
        if run.overwrite and (moved := output.move_aside(folder)) is not None:
            say(f"{folder} held something; it is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        clear_halves(folder)
        output.write_record(folder, record)
    accelerator.wait_for_everyone()
    if settings.report_to:
        plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in record.items() if v is not None}
        accelerator.init_trackers(folder.name, config=plain)

    before, start = checksums(model, skip=set(trained)), checksums(Only(trained))
    size = sum(p.numel() for p in trained.values())
    meter = CostMeter(folder, name, ModelShape.of(model), trained_parameters=size, resume=checkpoint is not None)

    def keep(trainer: VisMemTrainer) -> None:
        meter.write()
        if run.is_main:
            save_checkpoint(trainer, made.save, folder, settings.keep_checkpoints)
        accelerator.wait_for_everyone()

    def on_log(values: dict[str, float], step: int, total: int) -> None:
        append_metrics(folder, step, values)
        if settings.report_to:
            accelerator.log(values, step=step)
        if run.on_log is not None:
            run.on_log(values, step, total)

    def on_step(trainer: VisMemTrainer) -> None:
        meter.steps += 1
        if trainer.progress.step % settings.save_steps == 0 or trainer.progress.step == trainer.steps:
            keep(trainer)

    trainer = VisMemTrainer(
        model,
        made.processor,
        _Samples(data),
        run.rewards,
        stage,
        accelerator=accelerator,
        on_log=on_log,
        on_step=on_step,
        meter=meter,
    )
    say(
        f"{trainer.steps} steps of {settings.batch_size} questions x {settings.group_size} trajectories; {size:,} "
        "parameters are trained"
    )
    warm_start = None
    if checkpoint is not None:
        restore(trainer, checkpoint)
        if run.is_main:
            cut_metrics(folder, trainer.progress.step)
    elif isinstance(settings, FormationSettings) and settings.warm_start_steps and stage.forms_again:
        warm_start = warm_up(trainer, settings, say)
        keep(trainer)
    _same_everywhere(trained, accelerator)

    progress = trainer.train()

    untouched, moved_tensors = prove(model, trained, before, start, stage, folder)
    say(
        f"{moved_tensors} of {len(trained)} trained tensors changed; no bit of any of the other {untouched} did "
        "(digests before and after)"
    )
    if run.is_main:
        warn_of_no_signal(folder, stage.invokes)
    metrics = None
    if held_out is not None:
        say(f"evaluating on {held_out.rows:,} held-out questions")
        metrics = trainer.evaluate(_Samples(held_out), stage.policy(1.0))
        if stage.invokes:
            metrics["eval_reward_without_memory"] = trainer.evaluate(_Samples(held_out), NO_MEMORY)["eval_reward"]
        if getattr(settings, "train", None) == "lora" and stage.invokes:
            with without_policy(model):
                metrics["eval_reward_of_base"] = trainer.evaluate(_Samples(held_out), NO_MEMORY)["eval_reward"]
    if run.is_main:
        save_final(made.save, folder, card(run.source, run.rewards, trainer))
    cost = meter.write()
    accelerator.wait_for_everyone()
    if settings.report_to:
        accelerator.end_training()
    return VisMemReport(
        output_dir=folder,
        stage=stage.name,
        steps=progress.step,
        resumed_from=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        trained=size,
        untouched=untouched,
        changed=moved_tensors,
        reference=stage.reference_name,
        first=progress.first,
        last=progress.last,
        tokens_generated=progress.tokens_generated,
        tokens_trained=progress.tokens_trained,
        seconds=progress.seconds,
        cost=cost,
        data=data,
        warm_start=warm_start,
        metrics=metrics,
    )


def _check_space(
    folder: Path,
    settings: RlSettings,
    data: CheckedData,
    parameters: list[torch.nn.Parameter],
    branch: VisMemBranch,
) -> None:
    """A checkpoint holds the memory, and the trained tensors with AdamW's two moments, in float32."""
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(data.rows / settings.batch_size))
    number = min(math.ceil(steps / settings.save_steps), (settings.keep_checkpoints or steps) + 1)
    memory = sum(p.numel() for p in branch.active.parameters())
    each = 4 * memory + 16 * sum(p.numel() for p in parameters) + 2**20
    output.check_space(folder, each * (number + 1), f"the run ({number} checkpoints and the adapter)")


@torch.no_grad()
def _same_everywhere(trained: dict[str, torch.nn.Parameter], accelerator: Any) -> None:
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for parameter in trained.values():
            parameter.copy_(broadcast(parameter.detach().clone(), 0))
