"""Train a latent vision memory in two stages: formation (what to remember) and invocation (when, and which).

Source: VisMem (arXiv 2511.11007), the section on training; docs/train-vismem.md lists every deviation. The public code
of the paper does not hold this pipeline.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from keepsight.adapters import find_adapter, inspect_adapter
from keepsight.backbone import Backbone
from keepsight.bases import check_weights
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.loading import attach, load
from keepsight.sources import check_sources
from keepsight.train import output
from keepsight.train.accounting import CostMeter, RunCost
from keepsight.train.checksums import changed, checksums
from keepsight.train.data import CheckedData, check_dataset, load_dataset_any, read_sample
from keepsight.train.flops import ModelShape
from keepsight.train.rewards import DEFAULT_REWARDS, Reward, load_rewards
from keepsight.train.trainer import TrainingDivergedError
from keepsight.train.vismem_plan import plan_vismem
from keepsight.train.vismem_saving import (
    append_metrics,
    clear_halves,
    cut_metrics,
    restore,
    save_checkpoint,
    save_final,
)
from keepsight.train.vismem_settings import FormationSettings, InvocationSettings, RlSettings
from keepsight.train.vismem_stages import POLICY, Formation, Invocation, Stage
from keepsight.train.vismem_trainer import OnLog, VisMemTrainer
from keepsight.vismem import VisMemBranch, VisMemConfig, add_memory_tokens

Say = Callable[[str], None]
"""Called with one line for the user."""


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
class _Run:
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
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        return int(os.environ.get("RANK", "0")) == 0


def train_vismem_formation(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    vismem: VisMemConfig | None = None,
    rewards: Sequence[str | Reward | Callable[..., Any]] = DEFAULT_REWARDS,
    settings: FormationSettings | None = None,
    split: str = "train",
    text_only: Literal["error", "skip", "keep"] = "error",
    check: Literal["full", "quick"] = "full",
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    on_log: OnLog | None = None,
    on_check: Callable[[int, int], None] | None = None,
) -> VisMemReport:
    """Stage I: the memory learns what to remember, by reinforcement; the policy is frozen.

    Everything that can be wrong with data, rewards, settings and output folder is found before the weights are loaded.

    Args:
        source: a plain VLM (a folder, a hub id, or "keepsight/reference"), or a VisMem adapter to go on from.
        dataset: what `load_dataset_any` reads: questions with images, and the columns that the rewards want.
        output_dir: gets checkpoints, and at the end adapter and processor, so that `keepsight.load(output_dir)` works.
        vismem: the memory; default: `VisMemConfig()`. Not for an adapter, which has its own.
        rewards: names ("format", "answer", "package.module:function"), or functions f(prompts, completions, **columns).
        settings: how to train.
        split: of hub datasets and saved DatasetDicts.
        text_only: what to do with samples without an image; they can form long-term memories only.
        check: "full" decodes every image before training; "quick" only looks whether the files are there.
        resume: go on from the last whole checkpoint in `output_dir`, if there is one.
        overwrite: move what is in `output_dir` aside (nothing is deleted) and start anew.
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)`.
        on_check: called as `on_check(done, total)` while samples are checked.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        RewardError: naming a reward that fails.
        TrainingDivergedError: if a loss or gradient is not finite; earlier checkpoints stay.
    """
    settings = settings or FormationSettings()
    run = _Run(
        source,
        dataset,
        Path(output_dir),
        settings,
        _rewards(rewards),
        split,
        text_only,
        check,
        resume,
        overwrite,
        say,
        on_log,
        on_check,
    )
    is_adapter = find_adapter(source) is not None
    if is_adapter and vismem is not None:
        raise KeepsightError(f"{source} is an adapter with a configuration of its own; leave `vismem` out.")
    _check_engine(settings)
    output_free(run)
    if is_adapter:
        _require_vismem(source)
        config = _adapter_config(source)
    else:
        config = plan_vismem(source, vismem)
    if settings.gradient_checkpointing and config.form == "incremental":
        raise KeepsightError(
            "gradient_checkpointing cannot be combined with form='incremental', whose kept keys and values it would "
            "compute twice. Use form='literal', or leave gradient checkpointing off and lower rows_per_forward."
        )
    warm = f", after {settings.warm_start_steps} steps of warm start (ours)" if settings.warm_start_steps else ""
    say(f"{Formation.title}: rewards {Formation.objective_name}; KL against {Formation.reference_name}{warm}")

    def make() -> tuple[Any, Any, Any]:
        if is_adapter:
            model, processor = load(source, dtype=settings.dtype, device=_device(settings), trainable=True)
            return model, processor, None
        from peft import get_peft_model

        base, processor = load(source, dtype=settings.dtype, device=_device(settings))
        own = copy.deepcopy(vismem) if vismem is not None else VisMemConfig()
        add_memory_tokens(processor, own)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return get_peft_model(base, own), processor, None

    return _train(run, make, Formation, config)


def train_vismem_invocation(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    rewards: Sequence[str | Reward | Callable[..., Any]] = DEFAULT_REWARDS,
    settings: InvocationSettings | None = None,
    split: str = "train",
    text_only: Literal["error", "skip", "keep"] = "error",
    check: Literal["full", "quick"] = "full",
    resume: bool = False,
    overwrite: bool = False,
    say: Say = lambda line: None,
    on_log: OnLog | None = None,
    on_check: Callable[[int, int], None] | None = None,
) -> VisMemReport:
    """Stage II: the policy learns when to invoke which memory; the memory is frozen.

    With `settings.train="lora"` the policy's adapter is saved in `output_dir/policy`:
    `keepsight.load(output_dir, output_dir / "policy")`.

    Args:
        source: the VisMem adapter that stage I made.
        dataset: as in `train_vismem_formation`, and so are all others.
        output_dir: gets checkpoints, adapter and processor; not the folder of stage I.
        rewards: names or functions.
        settings: how to train.
        split: of hub datasets and saved DatasetDicts.
        text_only: what to do with samples without an image.
        check: "full" or "quick".
        resume: go on from the last whole checkpoint.
        overwrite: move aside what is in `output_dir`.
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)`.
        on_check: called as `on_check(done, total)`.

    Raises:
        KeepsightError, FileNotFoundError, RewardError, TrainingDivergedError: as in `train_vismem_formation`.
    """
    settings = settings or InvocationSettings()
    run = _Run(
        source,
        dataset,
        Path(output_dir),
        settings,
        _rewards(rewards),
        split,
        text_only,
        check,
        resume,
        overwrite,
        say,
        on_log,
        on_check,
    )
    if find_adapter(source) is None:
        raise KeepsightError(
            f"{source} is no adapter. Stage II teaches when to invoke a memory that stage I has formed: name the "
            "folder that `keepsight train vismem-formation` wrote."
        )
    _require_vismem(source)
    _check_engine(settings)
    output_free(run)
    config = _adapter_config(source)
    say(f"{Invocation.title}: rewards {Invocation.objective_name}; KL against {Invocation.reference_name}")
    if not settings.invocation_cost:
        say("invocation_cost is 0, as in the paper: a memory that never harms may end up invoked always")

    def make() -> tuple[Any, Any, Any]:
        if settings.train == "tokens":
            model, processor = load(source, dtype=settings.dtype, device=_device(settings), trainable=True)
            return model, processor, None
        return _with_policy(source, settings)

    return _train(run, make, Invocation, config)


# ---------------------------------------------------------------------------------------------- before the model loads


def _rewards(given: Sequence[str | Reward | Callable[..., Any]]) -> list[Reward]:
    found: list[Reward] = []
    for one in [given] if isinstance(given, str) else given:
        if isinstance(one, Reward):
            found.append(one)
        elif isinstance(one, str):
            found += load_rewards([one])
        else:
            found.append(Reward(getattr(one, "__name__", type(one).__name__), 1.0, one))
    return found or load_rewards([])  # which raises


def _check_engine(settings: RlSettings) -> None:
    from transformers.integrations import get_available_reporting_integrations

    from keepsight.train.engines import check_engine, current_engine

    check_engine(current_engine(), "vismem", on_gpu=settings.on_gpu)
    available = get_available_reporting_integrations()
    for tracker in settings.report_to:
        if tracker not in available:
            raise ValueError(
                f"report_to={tracker!r} is not installed (pip install {tracker}?). "
                f"Available: {', '.join(available) or 'none'}."
            )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no GPU.")


def output_free(run: _Run) -> None:
    """Make sure that the run may write where it should."""
    if run.resume and run.overwrite:
        raise KeepsightError("resume goes on with a run and overwrite starts anew; choose one of them.")
    if run.is_main:
        output.check_output(run.folder, run.resume, run.overwrite)


def _require_vismem(source: str | Path) -> None:
    path = find_adapter(source)
    assert path is not None
    method = inspect_adapter(path).method
    if method != "VISMEM":
        raise KeepsightError(f"{source} is a {method} adapter; expected a VisMem adapter.")


def _adapter_config(source: str | Path) -> VisMemConfig:
    """The configuration of an adapter, and checks of its base."""
    base, infos = check_sources(source, (), None, None)
    check_weights(base)
    return VisMemConfig.from_pretrained(str(infos[0].path))


def _check_data(run: _Run, columns_needed: bool) -> CheckedData:
    return check_dataset(
        load_dataset_any(run.dataset, run.split),
        kind="prompt",
        text_only=run.text_only,
        decode=run.check == "full",
        need_answer=columns_needed,
        progress=run.on_check,
    )


def _record(run: _Run, stage: str, config: VisMemConfig, data: CheckedData) -> dict[str, Any]:
    free = {"logging_steps", "save_steps", "keep_checkpoints", "report_to", "device", "rows_per_rollout"}
    unused = {"token_ids", "delimiter_ids", "peft_type", "auto_mapping", "base_model_name_or_path", "inference_mode"}
    memory = {
        f.name: getattr(config, f.name)
        for f in fields(VisMemConfig)
        if f.name not in unused and not f.name.startswith("base_")
    }
    chosen = {name: value for name, value in asdict(run.settings).items() if name not in free}
    rewards = [f"{reward.name}={reward.weight:g}" for reward in run.rewards]
    return {"stage": stage, "base": str(run.source), "samples": data.rows, "rewards": rewards, **memory, **chosen}


def _device(settings: RlSettings) -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if settings.on_gpu else "cpu"


# ------------------------------------------------------------------------------------------------------------ the model


def _with_policy(source: str | Path, settings: InvocationSettings) -> tuple[Any, Any, Any]:
    """(model with memory, processor, PEFT's wrapper of the policy's new LoRA)."""
    from peft import LoraConfig, get_peft_model

    base_name, infos = check_sources(source, (), None, None)
    base, _ = load(base_name, dtype=settings.dtype, device=_device(settings))
    processor = _processor(source)
    path = Backbone.of(base).decoder_path.replace(".", r"\.")
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=rf"{path}\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        policy = get_peft_model(base, lora, adapter_name=POLICY)
    model = attach(policy.get_base_model(), infos, trainable=True)
    add_memory_tokens(processor, model)
    return model, processor, policy


def _processor(source: str | Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(find_adapter(source))


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


def _train(
    run: _Run, make: Callable[[], tuple[Any, Any, Any]], stage_class: type[Stage], config: VisMemConfig
) -> VisMemReport:
    from accelerate import Accelerator

    settings, folder, say = run.settings, run.folder, run.say
    checkpoint = _find_checkpoint(run) if run.resume else None
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


def _find_checkpoint(run: _Run) -> Path | None:
    checkpoint, broken = output.last_checkpoint(run.folder)
    for why in broken:
        run.say(f"not resuming from {why}")
    if checkpoint is None:
        run.say(f"no checkpoint to resume from in {run.folder}; starting at step 0")
    else:
        run.say(f"resuming from {checkpoint}")
    return checkpoint


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


def _save_checkpoint(trainer: VisMemTrainer, policy: Any, run: _Run, meter: CostMeter, accelerator: Any) -> None:
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


def _say_plan(run: _Run, trainer: VisMemTrainer, branch: VisMemBranch) -> None:
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


def _card(run: _Run, stage: Stage, trainer: VisMemTrainer) -> str:
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


__all__ = [
    "FormationSettings",
    "InvocationSettings",
    "VisMemReport",
    "train_vismem_formation",
    "train_vismem_invocation",
]
