"""Train a latent vision memory in two stages: formation (what to remember) and invocation (when, and which).

Source: VisMem (arXiv 2511.11007), the section on training; docs/train-vismem.md lists every deviation. The public code
of the paper does not hold this pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.adapters import find_adapter
from keepsight.checkpoints.load import load_processor
from keepsight.data.collate import ConversationCollator
from keepsight.errors import KeepsightError
from keepsight.train.rewards.rewards import DEFAULT_REWARDS, Reward, load_rewards, needs_answer
from keepsight.train.run import preflight
from keepsight.train.run.arguments import RunArguments
from keepsight.train.run.controls import Control
from keepsight.train.run.engines import check_engine
from keepsight.train.run.preflight import Say, silent
from keepsight.train.run.trainer import OnLog
from keepsight.train.vismem.job import StageJob, VisMemReport
from keepsight.train.vismem.loading import (
    LoadedStage,
    adapter_config,
    load_formed,
    load_invoking,
    load_new,
    plan_vismem,
)
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings, RlSettings
from keepsight.train.vismem.stages import FormationStage, InvocationStage, Stage
from keepsight.vismem import VisMemConfig

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
        dataset: questions with images, and the columns that the rewards want; see `train_pvm`.
        output_dir: gets checkpoints, and at the end adapter and processor, so that `keepsight.load(output_dir)` works.
        vismem: the memory; default: `VisMemConfig()`. Not for an adapter, which has its own.
        rewards: names ("format", "answer", "package.module:function"), or functions f(prompts, completions, **columns).
        settings: how to train.
        eval_dataset: held-out questions, scored after the last step. With controls and without it, a tenth of the
            questions is held out.
        text_only: what to do with samples without an image; they can form long-term memories only.
        controls: what to train after the memory, for comparison: lora, sft, none (see `keepsight.train.run.controls`).
        split, eval_split, check, resume, overwrite, say, on_log, on_check: as in `keepsight.train.pvm.sft.train_pvm`.

    Raises:
        KeepsightError, FileNotFoundError: before training, for anything that would spoil it.
        RewardError: naming a reward that fails.
        TrainingDivergedError: if a loss or gradient is not finite; earlier checkpoints stay.
    """
    settings, scored = settings or FormationSettings(), _rewards_of(rewards)
    asked = RunArguments(
        dataset=dataset,
        folder=Path(output_dir),
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        split=split,
        check=check,
        resume=resume,
        overwrite=overwrite,
        controls=controls,
        say=say,
        on_log=on_log,
        on_check=on_check,
    )
    goes_on = find_adapter(source) is not None
    if goes_on and vismem is not None:
        raise KeepsightError(f"{source} is an adapter with a configuration of its own; leave `vismem` out.")
    _begin(asked, settings)
    config, base = adapter_config(source) if goes_on else (plan_vismem(source, vismem)[0], str(source))
    asked.check_base(base, settings)
    warm = f", after {settings.warm_start_steps} steps of warm start (ours)" if settings.warm_start_steps else ""
    say(f"{_about(FormationStage)}{warm}")
    new, formed = partial(load_new, base, vismem), partial(load_formed, str(source), base)
    start = partial(formed if goes_on else new, settings, say)
    return _train(FormationStage, str(source), base, config, asked, settings, scored, text_only, start)


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
        output_dir: gets checkpoints, adapter and processor; not the folder of stage I.
        settings: how to train.
        dataset, rewards, split, eval_dataset, eval_split, text_only, check, resume, overwrite, controls, say, on_log,
            on_check: as in `train_vismem_formation`.

    Raises:
        KeepsightError, FileNotFoundError, RewardError, TrainingDivergedError: as in `train_vismem_formation`.
    """
    settings, scored = settings or InvocationSettings(), _rewards_of(rewards)
    asked = RunArguments(
        dataset=dataset,
        folder=Path(output_dir),
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        split=split,
        check=check,
        resume=resume,
        overwrite=overwrite,
        controls=controls,
        say=say,
        on_log=on_log,
        on_check=on_check,
    )
    if find_adapter(source) is None:
        raise KeepsightError(
            f"{source} is no adapter. Stage II teaches when to invoke a memory that stage I has formed: name the "
            "folder that `keepsight train vismem-formation` wrote."
        )
    _begin(asked, settings)
    config, base = adapter_config(source)
    asked.check_base(base, settings)
    say(_about(InvocationStage))
    if not settings.invocation_cost:
        say("invocation_cost is 0, as in the paper: a memory that never harms may end up invoked always")
    start = partial(load_invoking, str(source), base, settings, say)
    return _train(InvocationStage, str(source), base, config, asked, settings, scored, text_only, start)


def _begin(asked: RunArguments, settings: RlSettings) -> None:
    """Refuse what cannot be used of all that is asked, before the base is looked at."""
    if asked.resume and asked.overwrite:
        raise KeepsightError("resume goes on with a run and overwrite starts anew; choose one of them.")
    asked.begin(settings)
    check_engine(asked.engine, "vismem", on_gpu=settings.on_gpu)
    if any(control.name == "mlp" for control in asked.controls):
        raise KeepsightError(
            "--control mlp is PVM's: a branch beside every block, which VisMem has not. Take lora, which has as many "
            "parameters as the memory; `keepsight diagnose` holds a memory against another image's and against noise."
        )


def _train(
    stage: type[Stage],
    source: str,
    base: str,
    config: VisMemConfig,
    asked: RunArguments,
    settings: RlSettings,
    rewards: list[Reward],
    text_only: Literal["error", "skip", "keep"],
    start: Callable[[], LoadedStage],
) -> VisMemReport:
    """Read the data, check them and tell about them; then train."""
    collator = ConversationCollator(load_processor(base))
    data, held_out = asked.read(collator, kind="prompt", text_only=text_only, need_answer=needs_answer(rewards))
    preflight.say_data(data, "questions", base, None, asked.say)
    job = StageJob(
        name=stage.name,
        source=source,
        base=base,
        config=config,
        asked=asked,
        settings=settings,
        rewards=rewards,
        data=data.mixed(),
        held_out=held_out,
        checkpoint=asked.checkpoint(),
        start=start,
    )
    return job.with_controls()


def _about(stage: type[Stage]) -> str:
    return f"{stage.title}: rewards {stage.objective_name}; KL against {stage.reference_name}"


def _rewards_of(given: Sequence[str | Reward | Callable[..., Any]]) -> list[Reward]:
    """Rewards by name, as they are, or made of functions f(prompts, completions, **columns)."""
    given = [given] if isinstance(given, str) else list(given)
    names = [one for one in given if isinstance(one, str)]
    ready = [one for one in given if isinstance(one, Reward)]
    functions = [one for one in given if not isinstance(one, (str, Reward))]
    made = [Reward(getattr(one, "__name__", type(one).__name__), 1.0, one) for one in functions]
    return [*(load_rewards(names) if names or not given else []), *ready, *made]
