"""Checks before any weight is read: settings, kernels, checkpoints, data, disk space."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from keepsight.checkpoints.attention import check_attention
from keepsight.data.check import CheckedData
from keepsight.installed import MissingExtraError
from keepsight.tested import warn_of_untested
from keepsight.train.run import output
from keepsight.train.run.engines import Engine
from keepsight.train.run.plan import MemoryPlan
from keepsight.train.run.settings import CommonSettings, RunSettings

_PACKAGES = {"azure_ml": "azureml-mlflow", "flyte": "flytekit"}  # where the tracker's own name is another package's
Say = Callable[[str], None]
"""Called with one line for the user."""


def silent(line: str) -> None:
    """Say nothing."""


def require_trl() -> None:
    """Raise ImportError, naming the extra, where TRL is not installed; warn where its release was not tested."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Training goes through TRL.", "train") from error
    warn_of_untested("trl")


def check_settings(settings: CommonSettings) -> None:
    """Refuse schedules, trackers and devices that are not there.

    Raises:
        ValueError: naming what there is.
    """
    from transformers import SchedulerType
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    schedules = [schedule.value for schedule in SchedulerType]
    if settings.scheduler not in schedules:
        raise ValueError(f"scheduler={settings.scheduler!r}: expected one of {', '.join(schedules)}.")
    available = get_available_reporting_integrations()
    for tracker in settings.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(tracker, INTEGRATION_TO_CALLBACK, 1)
            raise ValueError(
                f"report_to={tracker!r} is no tracker.{f' Did you mean {near[0]!r}?' if near else ''} "
                f"Known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}. Leave it out for none."
            )
        if tracker not in available:
            raise ValueError(
                f"report_to={tracker!r} is not installed: pip install {_PACKAGES.get(tracker, tracker)}. "
                f"Installed: {', '.join(available) or 'none'}."
            )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no GPU.")


def check_kernel(settings: CommonSettings, base: str | Path) -> None:
    """Refuse an attention kernel with which the run could not train (see `check_attention`).

    Args:
        settings: of any run; with `uses_bf16` where matrices may be multiplied in it.
        base: the plain base.
    """
    autocast = getattr(settings, "uses_bf16", False)
    check_attention(base, settings.attention, settings.device, settings.dtype, autocast, trains=True)


def find_checkpoint(folder: Path, say: Say) -> Path | None:
    """The newest whole checkpoint of a run; says which one it is, and why newer ones are not whole."""
    checkpoint, broken = output.last_checkpoint(folder)
    for why in broken:
        say(f"not resuming from {why}")
    if checkpoint is None:
        say(f"no checkpoint to resume from in {folder}; starting at step 0")
    else:
        say(f"resuming from {checkpoint}")
    return checkpoint


def say_data(data: CheckedData, what: str, loading: str, limit: int | None, say: Say) -> None:
    """Tell what the check found, what was decided, and what is not used."""
    for subject, words in data.told_lines():
        say(f"{subject}: {words}")
    for where, why in data.skipped[:5]:
        say(f"skipped {where}: {why}")
    if len(data.skipped) > 5:
        say(f"skipped {len(data.skipped)} {what} in all")
    longest = f", the longest of {data.longest} tokens" if data.longest else ""
    cut = f", {data.cut:,} with answers to be cut at {limit}" if data.cut else ""
    mix = data.mix()
    if mix is not None:
        say(f"mix: {mix}")
    are = f"{what.removesuffix('s')} is" if data.rows == 1 else f"{what} are"
    say(f"{data.rows:,} {are} good{longest}{cut}; loading {loading}")


def total_steps(settings: CommonSettings, per_epoch: int) -> int:
    """Optimiser steps of a run whose epoch has so many."""
    return settings.max_steps or math.ceil(settings.epochs * per_epoch)


def check_space(folder: Path, trained: int, saved: int, steps: int, settings: CommonSettings, there: int) -> None:
    """Make sure that the disk holds what the run will save.

    Args:
        folder: of the run.
        trained: parameters with two moments of AdamW in every checkpoint.
        saved: parameters whose values are in every checkpoint and in the result.
        steps: of the run.
        settings: how often checkpoints are saved, and how many are kept.
        there: checkpoints that are there already.
    """
    # One more than are kept: the oldest goes after the newest is written.
    number = min(math.ceil(steps / settings.save_steps), (settings.keep_checkpoints or steps) + 1) - there
    number = max(number, 0)
    needed = 4 * (number * (2 * trained + saved) + saved) + 2**20
    output.check_space(folder, needed, f"the run ({number} checkpoint{'s' * (number != 1)} and the result)")


def base_dtype(settings: RunSettings, plan: MemoryPlan) -> str:
    """Float16 overflows in training; a float16 checkpoint is read as bfloat16 on a GPU and float32 on a CPU."""
    if settings.dtype != "auto":
        return settings.dtype
    stored = str(getattr(plan.backbone.model.config, "dtype", None)).removeprefix("torch.")
    if stored != "float16":
        return "auto"
    return "bfloat16" if settings.on_gpu and torch.cuda.is_bf16_supported() else "float32"


def base_device(settings: CommonSettings, engine: Engine) -> str:
    """Where the base is read to. Weights that will be sharded need not fit on one GPU."""
    on_gpu = settings.on_gpu and not engine.shards_weights
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"
