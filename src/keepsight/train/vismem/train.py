"""Train a latent vision memory in two stages: formation (what to remember) and invocation (when, and which).

Source: VisMem (arXiv 2511.11007), the section on training; docs/train-vismem.md lists every deviation. The public code
of the paper does not hold this pipeline.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model

from keepsight.backbone import Backbone
from keepsight.checkpoints.adapters import find_adapter, inspect_adapter
from keepsight.checkpoints.bases import check_weights
from keepsight.checkpoints.load import attach
from keepsight.checkpoints.sources import check_sources
from keepsight.errors import KeepsightError
from keepsight.train.rewards.rewards import DEFAULT_REWARDS, Reward
from keepsight.train.run.controls import Control
from keepsight.train.run.engines import current_engine
from keepsight.train.run.four_bit import check_four_bit
from keepsight.train.run.preflight import Say, silent
from keepsight.train.vismem.asked import Questions, Run, check_run, record_of, rewards_of
from keepsight.train.vismem.controls import check_controls, compare
from keepsight.train.vismem.plan import plan_vismem
from keepsight.train.vismem.progress import OnLog
from keepsight.train.vismem.report import VisMemReport
from keepsight.train.vismem.run import Made, execute, load_here, ready, warn_untrained
from keepsight.train.vismem.saving import save_adapter
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings, uses_checkpointing
from keepsight.train.vismem.stage import Stage
from keepsight.train.vismem.stages import POLICY, Formation, Invocation
from keepsight.vismem import VisMemBranch, VisMemConfig, add_memory_tokens

__all__ = [
    "FormationSettings",
    "InvocationSettings",
    "VisMemReport",
    "train_vismem_formation",
    "train_vismem_invocation",
]

GivenReward = str | Reward | Callable[..., Any]


def train_vismem_formation(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    vismem: VisMemConfig | None = None,
    rewards: Sequence[GivenReward] = DEFAULT_REWARDS,
    settings: FormationSettings | None = None,
    split: str = "train",
    eval_dataset: Any = None,
    eval_split: str | None = None,
    text_only: Literal["error", "skip", "keep"] = "error",
    check: Literal["full", "quick"] = "full",
    resume: bool = False,
    overwrite: bool = False,
    controls: Sequence[Control] = (),
    say: Say = silent,
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
        eval_dataset: held-out questions, scored after the last step. With controls and without it, a tenth of the
            questions is held out.
        eval_split: the same for `eval_dataset`; default: as `split`.
        text_only: what to do with samples without an image; they can form long-term memories only.
        check: "full" decodes every image before training; "quick" only looks whether the files are there.
        resume: go on from the last whole checkpoint in `output_dir`, if there is one.
        overwrite: move what is in `output_dir` aside (nothing is deleted) and start anew.
        controls: what to train after the memory, for comparison: lora, sft, none (see `keepsight.train.run.controls`).
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)`.
        on_check: called as `on_check(done, total)` while samples are checked.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        RewardError: naming a reward that fails.
        TrainingDivergedError: if a loss or gradient is not finite; earlier checkpoints stay.
    """
    settings = settings or FormationSettings()
    run = Run(source, Path(output_dir), settings, rewards_of(rewards), resume, overwrite, say, on_log)
    is_adapter = find_adapter(source) is not None
    if is_adapter and vismem is not None:
        raise KeepsightError(f"{source} is an adapter with a configuration of its own; leave `vismem` out.")
    check_run(run)
    check_controls(controls)
    config, base_name = _adapter_config(source) if is_adapter else (plan_vismem(source, vismem), str(source))
    names = tuple(control.name for control in controls)
    check_four_bit(base_name, settings.load_in_4bit, current_engine(), controls=names)
    uses_checkpointing(settings, config.form, settings.on_gpu)
    warm = f", after {settings.warm_start_steps} steps of warm start (ours)" if settings.warm_start_steps else ""
    say(f"{Formation.title}: rewards {Formation.objective_name}; KL against {Formation.reference_name}{warm}")

    def make() -> Made:
        if is_adapter:
            model, processor = load_here(source, base_name, settings, trainable=True)
        else:
            base, processor = load_here(source, base_name, settings)
            own = copy.deepcopy(vismem) if vismem is not None else VisMemConfig()
            add_memory_tokens(processor, own)
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)
                model = get_peft_model(base, own)
        return _made(ready(model, say), processor, Formation, settings, None)

    questions = Questions(dataset, split, eval_dataset, eval_split, text_only, check, on_check)
    return _train(run, questions, controls, config, Formation, make)


def train_vismem_invocation(
    source: str | Path,
    dataset: Any,
    output_dir: str | Path,
    *,
    rewards: Sequence[GivenReward] = DEFAULT_REWARDS,
    settings: InvocationSettings | None = None,
    split: str = "train",
    eval_dataset: Any = None,
    eval_split: str | None = None,
    text_only: Literal["error", "skip", "keep"] = "error",
    check: Literal["full", "quick"] = "full",
    resume: bool = False,
    overwrite: bool = False,
    controls: Sequence[Control] = (),
    say: Say = silent,
    on_log: OnLog | None = None,
    on_check: Callable[[int, int], None] | None = None,
) -> VisMemReport:
    """Stage II: the policy learns when to invoke which memory; the memory is frozen.

    With `settings.train="lora"` the policy's adapter is saved in `output_dir/policy`, and `keepsight.load(output_dir)`
    loads both.

    Args:
        source: the VisMem adapter that stage I made.
        dataset: as in `train_vismem_formation`, and so are all others.
        output_dir: gets checkpoints, adapter and processor; not the folder of stage I.
        rewards: names or functions.
        settings: how to train.
        split: of hub datasets and saved DatasetDicts.
        eval_dataset: held-out questions.
        eval_split: of `eval_dataset`.
        text_only: what to do with samples without an image.
        check: "full" or "quick".
        resume: go on from the last whole checkpoint.
        overwrite: move aside what is in `output_dir`.
        controls: what to train after the memory, for comparison.
        say: receives lines for the user.
        on_log: called as `on_log(values, step, total steps)`.
        on_check: called as `on_check(done, total)`.

    Raises:
        KeepsightError, FileNotFoundError, RewardError, TrainingDivergedError: as in `train_vismem_formation`.
    """
    settings = settings or InvocationSettings()
    run = Run(source, Path(output_dir), settings, rewards_of(rewards), resume, overwrite, say, on_log)
    if find_adapter(source) is None:
        raise KeepsightError(
            f"{source} is no adapter. Stage II teaches when to invoke a memory that stage I has formed: name the "
            "folder that `keepsight train vismem-formation` wrote."
        )
    check_run(run)
    check_controls(controls)
    config, base = _adapter_config(source)
    names = tuple(control.name for control in controls)
    check_four_bit(base, settings.load_in_4bit, current_engine(), controls=names)
    say(f"{Invocation.title}: rewards {Invocation.objective_name}; KL against {Invocation.reference_name}")
    if not settings.invocation_cost:
        say("invocation_cost is 0, as in the paper: a memory that never harms may end up invoked always")

    def make() -> Made:
        policy = None
        if settings.train == "tokens":
            model, processor = load_here(source, base, settings, trainable=True)
        else:
            model, processor, policy = _with_policy(source, base, settings)
        warn_untrained(model, settings)
        return _made(ready(model, say), processor, Invocation, settings, policy)

    questions = Questions(dataset, split, eval_dataset, eval_split, text_only, check, on_check)
    return _train(run, questions, controls, config, Invocation, make)


def _train(
    run: Run,
    questions: Questions,
    controls: Sequence[Control],
    config: VisMemConfig,
    stage: type[Stage],
    make: Callable[[], Made],
) -> VisMemReport:
    data, held_out = questions.checked(run, controls)
    size = 0

    def counted() -> Made:
        nonlocal size
        made = make()
        size = sum(p.numel() for p in VisMemBranch.of(made.model).active.parameters())
        return made

    record = record_of(run, stage.name, config, data)
    report = execute(run, f"vismem {stage.name}", record, data, held_out, counted)
    if not controls:
        return report
    base = str(run.source) if find_adapter(run.source) is None else _adapter_config(run.source)[1]
    comparison = compare(run, report, base, size, controls, data, held_out)
    if run.is_main:
        comparison.write(run.folder)
    return replace(report, comparison=comparison)


def _made(model: Any, processor: Any, stage: type[Stage], settings: Any, policy: Any) -> Made:
    return Made(model, processor, stage(model, settings), lambda folder: save_adapter(model, policy, processor, folder))


def _adapter_config(source: str | Path) -> tuple[VisMemConfig, str]:
    """(an adapter's configuration, its base); raises unless it is a whole VisMem adapter from stage I."""
    path = find_adapter(source)
    assert path is not None
    method = inspect_adapter(path).method
    if method != "VISMEM":
        raise KeepsightError(f"{source} is a {method} adapter; expected a VisMem adapter.")
    base, infos = check_sources(source)
    check_weights(base)
    if len(infos) > 1:
        raise KeepsightError(
            f"{source} holds a trained policy beside its memory: it has been through stage II with --train lora, which "
            "is the last stage. Start from the folder of stage I."
        )
    return VisMemConfig.from_pretrained(str(infos[0].path)), base


def _with_policy(source: str | Path, base_name: str, settings: InvocationSettings) -> tuple[Any, Any, Any]:
    """(model with memory, processor, PEFT's wrapper of the policy's new LoRA)."""
    from transformers import AutoProcessor

    _, infos = check_sources(source)
    base, _ = load_here(base_name, base_name, settings)
    processor = AutoProcessor.from_pretrained(infos[0].path)
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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two adapters are meant
        model = attach(policy.get_base_model(), infos, trainable=True)
    add_memory_tokens(processor, model)
    return model, processor, policy
