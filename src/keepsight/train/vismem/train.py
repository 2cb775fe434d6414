"""Train a latent vision memory in two stages: formation (what to remember) and invocation (when, and which).

Source: VisMem (arXiv 2511.11007), the section on training; docs/train-vismem.md lists every deviation. The public code
of the paper does not hold this pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.adapters import find_adapter
from keepsight.checkpoints.load import load_processor
from keepsight.data.check import CheckedData
from keepsight.data.collate import ConversationCollator
from keepsight.errors import KeepsightError
from keepsight.train.rewards.rewards import DEFAULT_REWARDS, Reward, load_rewards
from keepsight.train.run import output, preflight
from keepsight.train.run.controls import Control
from keepsight.train.run.engines import Engine, check_engine, current_engine
from keepsight.train.run.four_bit import check_four_bit
from keepsight.train.run.preflight import Say, silent
from keepsight.train.run.trainer import OnLog
from keepsight.train.vismem.job import StageJob, VisMemReport
from keepsight.train.vismem.loading import adapter_config, load_formed, load_invoking, load_new, plan_vismem
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings, RlSettings, uses_checkpointing
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
        dataset: what `load_dataset_any` reads: questions with images, and the columns that the rewards want. Or a list
            of such, each alone or as (dataset, weight), to be mixed in the shares of their weights.
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
    folder, scored = Path(output_dir), _rewards_of(rewards)
    questions = _Questions(dataset, split, eval_dataset, eval_split, text_only, check, on_check)
    goes_on = find_adapter(source) is not None
    if goes_on and vismem is not None:
        raise KeepsightError(f"{source} is an adapter with a configuration of its own; leave `vismem` out.")
    engine = _check_run(settings, folder, resume, overwrite, controls)
    config, base = adapter_config(source) if goes_on else (plan_vismem(source, vismem)[0], str(source))
    _check_base(base, settings, engine, controls)
    uses_checkpointing(settings, config.form, settings.on_gpu)
    warm = f", after {settings.warm_start_steps} steps of warm start (ours)" if settings.warm_start_steps else ""
    say(f"{_about(FormationStage)}{warm}")
    data, held_out = questions.read(base, scored, bool(controls), say)
    what = (FormationStage.name, str(source), base, config, folder, settings, scored, data, held_out)
    job = StageJob(*what, engine, resume, overwrite, say, on_log)
    new, formed = partial(load_new, base, vismem), partial(load_formed, job.source, base)
    return job.beside(job.train(partial(formed if goes_on else new, settings, say)), controls)


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
    folder, scored = Path(output_dir), _rewards_of(rewards)
    questions = _Questions(dataset, split, eval_dataset, eval_split, text_only, check, on_check)
    if find_adapter(source) is None:
        raise KeepsightError(
            f"{source} is no adapter. Stage II teaches when to invoke a memory that stage I has formed: name the "
            "folder that `keepsight train vismem-formation` wrote."
        )
    engine = _check_run(settings, folder, resume, overwrite, controls)
    config, base = adapter_config(source)
    _check_base(base, settings, engine, controls)
    say(_about(InvocationStage))
    if not settings.invocation_cost:
        say("invocation_cost is 0, as in the paper: a memory that never harms may end up invoked always")
    data, held_out = questions.read(base, scored, bool(controls), say)
    what = (InvocationStage.name, str(source), base, config, folder, settings, scored, data, held_out)
    job = StageJob(*what, engine, resume, overwrite, say, on_log)
    return job.beside(job.train(partial(load_invoking, job.source, base, settings, say)), controls)


@dataclass(frozen=True)
class _Questions:
    """What is read; the functions above tell what each of it means."""

    dataset: Any
    split: str
    eval_dataset: Any
    eval_split: str | None
    text_only: Literal["error", "skip", "keep"]
    check: Literal["full", "quick"]
    on_check: Callable[[int, int], None] | None

    def read(self, base: str, rewards: list[Reward], hold: bool, say: Say) -> tuple[CheckedData, CheckedData | None]:
        """(to train on, to evaluate on): read, checked and told about."""
        data, held_out = preflight.check_data(
            (self.dataset, self.split),
            None if self.eval_dataset is None else (self.eval_dataset, self.eval_split or self.split),
            ConversationCollator(load_processor(base)),
            kind="prompt",
            text_only=self.text_only,
            decode=self.check == "full",
            need_answer=any(reward.name in ("answer", "match") for reward in rewards),
            hold=hold,
            say=say,
            on_check=self.on_check,
        )
        preflight.say_data(data, "questions", base, None, say)
        return data.mixed(), held_out


def _check_run(
    settings: RlSettings, folder: Path, resume: bool, overwrite: bool, controls: Sequence[Control]
) -> Engine:
    """Refuse engines, trackers, devices, output folders and controls that cannot be used; returns the engine."""
    engine = current_engine()
    check_engine(engine, "vismem", on_gpu=settings.on_gpu)
    preflight.check_settings(settings)
    if resume and overwrite:
        raise KeepsightError("resume goes on with a run and overwrite starts anew; choose one of them.")
    if engine.is_main:
        output.check_output(folder, resume, overwrite)
    if any(control.name == "mlp" for control in controls):
        raise KeepsightError(
            "--control mlp is PVM's: a branch beside every block, which VisMem has not. Take lora, which has as many "
            "parameters as the memory; `keepsight diagnose` holds a memory against another image's and against noise."
        )
    return engine


def _check_base(base: str, settings: RlSettings, engine: Engine, controls: Sequence[Control]) -> None:
    """Refuse a base that cannot be held, or attended with, as the settings ask."""
    preflight.check_kernel(settings, base)
    check_four_bit(base, settings.load_in_4bit, engine, controls=tuple(control.name for control in controls))


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
