"""One run of VisMem's training, from checked data to a saved adapter: the same for both stages."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftConfig

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train import output
from keepsight.train.accounting import CostMeter, RunCost
from keepsight.train.checksums import changed, checksums
from keepsight.train.data import CheckedData, check_dataset, load_dataset_any, read_sample
from keepsight.train.engines import check_engine, current_engine
from keepsight.train.flops import ModelShape
from keepsight.train.preflight import Say, check_settings, find_checkpoint
from keepsight.train.rewards import Reward, load_rewards
from keepsight.train.trainer import TrainingDivergedError
from keepsight.train.vismem_saving import (
    append_metrics,
    clear_halves,
    cut_metrics,
    restore,
    save_checkpoint,
    save_final,
)
from keepsight.train.vismem_settings import FormationSettings, InvocationSettings, RlSettings
from keepsight.train.vismem_stages import Stage
from keepsight.train.vismem_trainer import OnLog, VisMemTrainer
from keepsight.vismem import VisMemBranch, VisMemConfig


@dataclass(frozen=True)
class VisMemReport:
    """What a run did, all measured in it.

    Attributes:
        output_dir: where the adapter and its processor are.
        stage: "formation" or "invocation".
        steps: of the whole run, those before a resume included.
        resumed_from: step of the checkpoint the run went on from, or None.
        trained: trained parameters.
        untouched: tensors that were not to be trained and of which no bit changed (compared at the end).
        changed: trained tensors that changed.
        reference: what the KL penalty is measured against.
        first, last: what was logged at the first and the last step.
        tokens_generated, tokens_trained: positions written, and positions that gradients went through.
        seconds: in the training loop, those before a resume included.
        cost: what the run cost.
        data: what was checked, skipped and kept.
        warm_start: what the warm start did, or None.
    """

    output_dir: Path
    stage: str
    steps: int
    resumed_from: int | None
    trained: int
    untouched: int
    changed: int
    reference: str
    first: dict[str, float]
    last: dict[str, float]
    tokens_generated: int
    tokens_trained: int
    seconds: float
    cost: RunCost
    data: CheckedData
    warm_start: Any = None


@dataclass
class Run:
    """What both stages are asked for."""

    source: str | Path
    dataset: Any
    folder: Path
    settings: RlSettings
    rewards: list[Reward]
    split: str
    text_only: Literal["error", "skip", "keep"]
    check: Literal["full", "quick"]
    resume: bool
    overwrite: bool
    say: Say
    on_log: OnLog | None
    on_check: Callable[[int, int], None] | None

    @property
    def is_main(self) -> bool:
        """Whether this process talks and writes."""
        return int(os.environ.get("RANK", "0")) == 0


# ---------------------------------------------------------------------------------------------- before the model loads


def rewards_of(given: Sequence[str | Reward | Callable[..., Any]]) -> list[Reward]:
    """Rewards by name, as they are, or made of functions f(prompts, completions, **columns)."""
    given = [given] if isinstance(given, str) else list(given)
    names = [one for one in given if isinstance(one, str)]
    ready = [one for one in given if isinstance(one, Reward)]
    functions = [one for one in given if not isinstance(one, (str, Reward))]
    made = [Reward(getattr(one, "__name__", type(one).__name__), 1.0, one) for one in functions]
    return [*(load_rewards(names) if names or not given else []), *ready, *made]


def check_run(run: Run) -> None:
    """Refuse engines, trackers, devices and output folders that cannot be used."""
    settings = run.settings
    check_engine(current_engine(), "vismem", on_gpu=settings.on_gpu)
    check_settings(cast(Any, settings))  # scheduler, trackers and device, which all settings have
    if run.resume and run.overwrite:
        raise KeepsightError("resume goes on with a run and overwrite starts anew; choose one of them.")
    if run.is_main:
        output.check_output(run.folder, run.resume, run.overwrite)


def _check_data(run: Run, columns_needed: bool) -> CheckedData:
    return check_dataset(
        load_dataset_any(run.dataset, run.split),
        kind="prompt",
        text_only=run.text_only,
        decode=run.check == "full",
        need_answer=columns_needed,
        progress=run.on_check,
    )


def _record(run: Run, stage: str, config: VisMemConfig, data: CheckedData) -> dict[str, Any]:
    free = {"logging_steps", "save_steps", "keep_checkpoints", "report_to", "device", "rows_per_rollout"}
    general = {f.name for f in fields(PeftConfig)} | {"token_ids", "delimiter_ids"}
    names = [f.name for f in fields(VisMemConfig) if f.name not in general and not f.name.startswith("base_")]
    memory = {name: getattr(config, name) for name in names}
    chosen = {name: value for name, value in asdict(run.settings).items() if name not in free}
    rewards = [f"{reward.name}={reward.weight:g}" for reward in run.rewards]
    return {"stage": stage, "base": str(run.source), "samples": data.rows, "rewards": rewards, **memory, **chosen}


def device_of(settings: RlSettings) -> str:
    """Where this process trains."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if settings.on_gpu else "cpu"


# ------------------------------------------------------------------------------------------------------------ the model


def _half_is_no_dtype_to_train_in(model: Any, say: Say) -> None:
    base = Backbone.of(model).model
    if base.dtype == torch.float16:
        better = torch.bfloat16 if base.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        base.to(better)
        say(f"the base is stored in float16, which overflows in training; it is used in {better}".replace("torch.", ""))


# ----------------------------------------------------------------------------------------------------------- the run


class _Samples:
    """Checked data as the trainer reads them."""

    def __init__(self, data: CheckedData):
        self.data = data

    def __len__(self) -> int:
        return self.data.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_sample(self.data.dataset[index], self.data.source)


def execute(
    run: Run, make: Callable[[], tuple[Any, Any, Any]], stage_class: type[Stage], config: VisMemConfig
) -> VisMemReport:
    """Check data, load the model, train, compare digests, save.

    Args:
        run: what was asked for.
        make: loads (model with memory, processor, PEFT's wrapper of the policy's LoRA or None).
        stage_class: which stage.
        config: the memory's resolved configuration.
    """
    from accelerate import Accelerator

    settings, folder, say = run.settings, run.folder, run.say
    checkpoint = find_checkpoint(run.folder, say) if run.resume else None
    wants_answer = any(reward.name in ("answer", "match") for reward in run.rewards)
    data = _check_data(run, wants_answer)
    for where, why in data.skipped[:5]:
        say(f"skipped {where}: {why}")
    say(f"{data.rows:,} samples are good; loading {run.source}")
    record = _record(run, stage_class.name, config, data)
    if checkpoint is not None:
        output.check_record(folder, record)

    model, processor, policy = make()
    _half_is_no_dtype_to_train_in(model, say)
    branch = VisMemBranch.of(model)
    branch.active.float()
    accelerator = Accelerator(
        cpu=not settings.on_gpu, log_with=list(settings.report_to) or None, project_dir=str(folder)
    )
    stage = stage_class(model, settings)
    if run.is_main:
        parameters = list(stage.trained().values())
        _check_space(folder, settings, data, parameters, branch, accelerator.num_processes)
        if run.overwrite and (moved := output.move_aside(folder)) is not None:
            say(f"{folder} held something; it is now {moved}")
        folder.mkdir(parents=True, exist_ok=True)
        clear_halves(folder)
        output.write_record(folder, record)
    accelerator.wait_for_everyone()
    if settings.report_to:
        plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in record.items() if v is not None}
        accelerator.init_trackers(folder.name, config=plain)

    trained = stage.trained()
    before = checksums(model, skip=set(trained))
    start = checksums(_Only(trained))
    assert before is not None
    assert start is not None
    meter = CostMeter(
        folder,
        f"vismem {stage.name}",
        ModelShape.of(model),
        trained_parameters=sum(p.numel() for p in trained.values()),
        resume=checkpoint is not None,
    )

    def on_log(values: dict[str, float], step: int, total: int) -> None:
        append_metrics(folder, step, values)
        if settings.report_to:
            accelerator.log(values, step=step)
        if run.on_log is not None:
            run.on_log(values, step, total)

    def on_step(trainer: VisMemTrainer) -> None:
        meter.steps += 1
        if trainer.progress.step % settings.save_steps == 0 and trainer.progress.step < trainer.steps:
            _save_checkpoint(trainer, policy, run, meter, accelerator)

    trainer = VisMemTrainer(
        model,
        processor,
        _Samples(data),
        run.rewards,
        stage,
        accelerator=accelerator,
        on_log=on_log,
        on_step=on_step,
        meter=meter,
    )
    _say_plan(run, trainer, branch)
    warm_start = None
    if checkpoint is not None:
        restore(trainer, checkpoint)
        if run.is_main:
            cut_metrics(folder, trainer.progress.step)
    elif isinstance(settings, FormationSettings) and settings.warm_start_steps:
        warm_start = _warm_start(trainer, settings, say)
        _save_checkpoint(trainer, policy, run, meter, accelerator)
    _same_everywhere(trained, accelerator)

    progress = trainer.train()

    after, end = checksums(model, skip=set(trained)), checksums(_Only(trained))
    assert after is not None
    assert end is not None
    wrong = changed(before, after)
    if wrong:
        raise KeepsightError(
            f"{len(wrong)} tensors that {stage.title} must not change did change, such as {wrong[0]}; nothing was "
            f"saved. This must never happen: please report it with the settings in {folder / output.RECORD}."
        )
    broken = [name for name, p in trained.items() if not bool(p.isfinite().all())]
    if broken:
        raise TrainingDivergedError(
            f"After the last step {len(broken)} tensors hold NaN or infinite values, such as {broken[0]}; the adapter "
            "was not saved. Earlier checkpoints stay. Try a lower learning rate."
        )
    moved_tensors = changed(start, end)
    say(
        f"{len(moved_tensors)} of {len(trained)} trained tensors changed; no bit of any of the other {len(after)} did "
        "(digests before and after)"
    )
    if run.is_main:
        save_final(model, policy, processor, folder, _card(run, stage, trainer))
    cost = meter.write()
    accelerator.wait_for_everyone()
    if settings.report_to:
        accelerator.end_training()
    return VisMemReport(
        output_dir=folder,
        stage=stage.name,
        steps=progress.step,
        resumed_from=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        trained=sum(p.numel() for p in trained.values()),
        untouched=len(after),
        changed=len(moved_tensors),
        reference=stage.reference_name,
        first=progress.first,
        last=progress.last,
        tokens_generated=progress.tokens_generated,
        tokens_trained=progress.tokens_trained,
        seconds=progress.seconds,
        cost=cost,
        data=data,
        warm_start=warm_start,
    )


class _Only(torch.nn.Module):
    """A module that holds some parameters under their names, to take checksums of."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__()
        self.held = parameters

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield from self.held.items()


def _check_space(
    folder: Path,
    settings: RlSettings,
    data: CheckedData,
    parameters: list[torch.nn.Parameter],
    branch: VisMemBranch,
    processes: int,
) -> None:
    """A checkpoint holds the memory, and the trained tensors with AdamW's two moments, in float32."""
    steps = settings.max_steps or math.ceil(settings.epochs * math.ceil(data.rows / settings.batch_size))
    number = min(math.ceil(steps / settings.save_steps), (settings.keep_checkpoints or steps) + 1)
    memory = sum(p.numel() for p in branch.active.parameters())
    each = 4 * memory + 16 * sum(p.numel() for p in parameters) + 2**20
    output.check_space(folder, each * (number + 1), f"the run ({number} checkpoints and the adapter)")


def _save_checkpoint(trainer: VisMemTrainer, policy: Any, run: Run, meter: CostMeter, accelerator: Any) -> None:
    meter.write()
    if run.is_main:
        save_checkpoint(trainer, policy, run.folder, run.settings.keep_checkpoints)
    accelerator.wait_for_everyone()


def _warm_start(trainer: VisMemTrainer, settings: FormationSettings, say: Say) -> Any:
    from keepsight.train.rollout import padding_id, stack_prompts
    from keepsight.train.vismem_prompts import Order
    from keepsight.train.warm_start import distill

    model, questions = trainer.model, trainer.questions
    order = Order(len(questions), settings.warm_start_batch, settings.seed + 1)
    pad = padding_id(Backbone.of(model).model)

    class Batches:
        """Model inputs of one warm-start step after the other."""

        def __iter__(self) -> Any:
            for step in range(settings.warm_start_steps):
                yield stack_prompts([questions[i].inputs for i in order.batch(step)], pad)

    say(f"warm start (latent distillation, ours, not in the paper): {settings.warm_start_steps} steps")
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        report = distill(
            model,
            Batches(),
            steps=settings.warm_start_steps,
            lr=settings.warm_start_lr,
            max_text_states=None,
            on_log=None,
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
    model.eval()
    errors = ", ".join(f"{kind} {report.first[kind]:.3f} -> {report.last[kind]:.3f}" for kind in report.last)
    say(f"warm start done in {report.seconds:.1f} s; relative squared error: {errors}")
    return report


@torch.no_grad()
def _same_everywhere(trained: dict[str, torch.nn.Parameter], accelerator: Any) -> None:
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for parameter in trained.values():
            parameter.copy_(broadcast(parameter.detach().clone(), 0))


def _say_plan(run: Run, trainer: VisMemTrainer, branch: VisMemBranch) -> None:
    settings, config = run.settings, branch.config
    budget = config.max_invocations if settings.max_invocations is None else settings.max_invocations
    run.say(
        f"{trainer.steps} steps of {settings.batch_size} prompts x {settings.group_size} trajectories; at most "
        f"{budget} memories each; {sum(p.numel() for p in trainer.stage.trained().values()):,} parameters are trained"
    )
    if isinstance(settings, InvocationSettings) and branch.active.short_bank.is_untrained:
        warnings.warn(
            "The memory of this adapter was never trained: stage II would learn when to invoke noise. Run stage I "
            "(keepsight train vismem-formation) first.",
            KeepsightWarning,
            stacklevel=2,
        )


def _card(run: Run, stage: Stage, trainer: VisMemTrainer) -> str:
    """The README of the adapter folder, which is also its card on the hub."""
    first, last, settings = trainer.progress.first, trainer.progress.last, run.settings
    config = VisMemBranch.of(trainer.model).config
    reward = f"{first.get('reward', math.nan):.4f} at first, {last.get('reward', math.nan):.4f} at last"
    more = ""
    if isinstance(settings, FormationSettings):
        more = f"| warm start (ours, not in the paper) | {settings.warm_start_steps} steps |\n"
    if isinstance(settings, InvocationSettings):
        more = f"| invocation cost (ours; the paper's is 0) | {settings.invocation_cost:g} |\n"
    return f"""---
base_model: {config.base_model_name_or_path or run.source}
library_name: peft
tags: [keepsight, vismem, vision-language]
---

# A latent vision memory (VisMem), {stage.title}

Made with keepsight from {run.source}; the base model is unchanged.

```python
import keepsight

model, processor = keepsight.load("this folder or its hub id")
```

| | |
|---|---|
| method | VisMem (arXiv 2511.11007), {config.form} form |
| K, N_s, N_l | {config.num_queries}, {config.num_short}, {config.num_long} |
| training | {trainer.progress.step} steps, {settings.batch_size} prompts x {settings.group_size} trajectories |
| rewards | {", ".join(f"{r.weight:g} x {r.name}" for r in run.rewards)} |
| mean reward | {reward} |
| KL against | {stage.reference_name} |
| peak learning rate | {settings.lr:g}; seed {settings.seed} |
{more}"""
