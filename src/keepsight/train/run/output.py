"""The output folder of a training run: checked before the first step, resumable, never losing what it holds."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from keepsight.checkpoints.adapters import inspect_adapter
from keepsight.checkpoints.atomic import write_text
from keepsight.checkpoints.bases import check_weights
from keepsight.checkpoints.sources import POLICY, check_recorded
from keepsight.errors import KeepsightError
from keepsight.modes import readable

RECORD = "keepsight_run.json"
TRACES = (RECORD, "keepsight_frozen.json", "cost.json")
"""What a run leaves that has saved nothing yet."""
SAVING = ".saving-"
"""How folders begin that the result is put together in."""
_PROBE = ".keepsight_probe"


class OutputError(KeepsightError):
    """The output folder cannot be used as asked."""


def check_output(folder: Path, resume: bool = False, overwrite: bool = False) -> None:
    """Make sure that a run may write into `folder`, and can. Leaves no trace.

    Raises:
        OutputError: if it holds something and neither `resume` nor `overwrite` is set, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; the output directory must be a folder.")
    held = sorted(path.name for path in folder.iterdir() if path.name != _PROBE) if folder.is_dir() else []
    saved = [name for name in held if name not in TRACES]
    if saved and not (resume or overwrite):
        more = ", ..." if len(held) > 4 else ""
        raise OutputError(
            f"{folder} is not empty ({', '.join(held[:4])}{more}). Go on with the run in it: --resume. Start anew and "
            "keep the old content beside it: --overwrite. Or name another --output-dir."
        )
    if held and resume and RECORD not in held and not any(name.startswith("checkpoint-") for name in held):
        raise OutputError(
            f"{folder} holds something ({', '.join(held[:4])}), but no training run that --resume could go on with. "
            "Name the --output-dir of that run."
        )
    probe = folder / _PROBE
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 65536)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error.strerror or str(error)
        raise OutputError(
            f"{folder} cannot be written: {why}. Nothing was trained. Name another --output-dir."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for parent in made:
                parent.rmdir()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Make sure that `needed` bytes are free.

    Raises:
        OutputError: if not.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OutputError(
            f"{folder}: {free / 1e6:,.0f} MB are free, and {what} needs about {needed / 1e6:,.0f} MB. Free some space, "
            "keep fewer checkpoints (--keep-checkpoints), or name an --output-dir on another disk."
        )


def move_aside(folder: Path) -> Path | None:
    """Rename a folder, if it holds something, to `<name>.old`, `<name>.old-2`, ..., and make an empty one."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    number, target = 1, folder.with_name(f"{folder.name}.old")
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.old-{number}")
    folder.rename(target)
    folder.mkdir()
    return target


def last_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and why each newer one is not.

    The trainer writes `trainer_state.json` last, so a run killed while saving leaves a checkpoint without it.
    """
    try:
        held = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # nothing yet; `check_output` makes the folder and takes it away
        return None, []
    found = [(int(m[1]), p) for p in held if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and p.is_dir()]
    broken: list[str] = []
    for _, path in sorted(found, reverse=True):
        why = _what_is_wrong(path)
        if why is None:
            return path, broken
        broken.append(f"{path.name}: {why}")
    return None, broken


def step_of(checkpoint: Path) -> int:
    """The step of `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def clear_halves(folder: Path) -> None:
    """Delete what sessions that were killed left half-written."""
    for half in (*folder.glob(f"{SAVING}*"), *folder.glob(".checkpoint-*.part")):
        shutil.rmtree(half, ignore_errors=True)


def keep_newest(folder: Path, count: int | None) -> None:
    """Delete all checkpoints but the newest `count`; None keeps all."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    for old in found[: max(0, len(found) - count)] if count is not None else ():
        shutil.rmtree(old, ignore_errors=True)


def _what_is_wrong(checkpoint: Path) -> str | None:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "saving it was interrupted"
    policy = checkpoint / POLICY
    try:
        if (checkpoint / "config.json").is_file():
            check_weights(checkpoint)
        else:
            check_recorded(inspect_adapter(checkpoint))
        if (policy / "config.json").is_file():
            check_weights(policy)
        elif policy.is_dir():
            check_recorded(inspect_adapter(policy))
    except KeepsightError as error:
        return str(error)
    optimizer = checkpoint / "optimizer.pt"
    if optimizer.exists() and not zipfile.is_zipfile(optimizer):
        return "its optimizer.pt is cut off"
    return None


def write_record(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what the run was started with, for `check_record`."""
    write_text(folder / RECORD, json.dumps(settings, indent=2) + "\n")


def check_record(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a run under other settings than it was started with.

    Raises:
        OutputError: naming each setting that differs.
    """
    try:
        recorded = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return  # a run of another tool, or of the Python API without a record: nothing to compare
    now = json.loads(json.dumps(settings))
    different = [
        f"{name} was {recorded[name]}, now {now[name]}" for name in now if recorded.get(name, now[name]) != now[name]
    ]
    if different:
        raise OutputError(
            f"{folder} was started with other settings: {'; '.join(different)}. Resume with the same ones, or start a "
            "new run in another --output-dir."
        )


def put_in_place(source: Path, folder: Path) -> None:
    """Move files and folders from `source` into `folder`, each in one step, so that a reader never sees half of one."""
    readable(source.rglob("*.safetensors"))
    for path in sorted(source.iterdir(), key=lambda path: (path.is_file(), path.name)):
        target = folder / path.name
        if path.is_dir() and target.exists():
            target.rename(source / f".{path.name}.replaced")
        os.replace(path, target)
    shutil.rmtree(source)
