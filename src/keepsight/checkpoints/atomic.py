"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from keepsight.errors import KeepsightError
from keepsight.modes import readable


def write_text(file: Path, text: str) -> None:
    """Write beside the file, then put it in its place: a reader finds the old text or the new one, never a part.

    Args:
        file: its folder must be there.
        text: written as UTF-8.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_json(file: Path, value: Any) -> None:
    """JSON as transformers writes it, whole or not at all."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_target(target: Path, overwrite: bool, foreign: str | None, kind: type[KeepsightError]) -> Path:
    """Refuse a folder that cannot be made, or that would be lost.

    Args:
        target: the folder.
        overwrite: whether an earlier result that is there may be replaced.
        foreign: of what is there, why it is no earlier result (as in "is not ..."); None: it is one.
        kind: the error to raise.

    Returns:
        The nearest folder above it that exists.
    """
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise kind(f"{target} exists. Name another OUT, or give --overwrite to replace it.")
        if foreign is not None:
            raise kind(f"{target} is not {foreign}, so it is not overwritten. Name another OUT.")
    there = next(parent for parent in target.resolve().parents if parent.exists())
    if not there.is_dir():
        raise kind(f"{target} cannot be made: {there} is a file.")
    return there


def try_folder(folder: Path) -> None:
    """Find out whether files can be written to `folder`, which need not be there yet; nothing is left of the try.

    Raises:
        OSError: they cannot.
    """
    made = next((p for p in (folder, *folder.parents) if p.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for place in (folder, *folder.parents):
            if place == made or not place.is_dir() or any(place.iterdir()):
                break
            place.rmdir()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends and vanishes if the block fails.

    Args:
        target: where the folder goes; a folder that is there is replaced, whole, at the end.

    Yields:
        An empty folder beside `target`, on the same disk.
    """
    target = target.absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    replaced = folder / "replaced"
    try:
        fresh = folder / "fresh"
        fresh.mkdir()  # not `folder` itself, which mkdtemp makes readable by its owner only
        yield fresh
        readable(fresh.rglob("*.safetensors"))
        if target.exists():
            target.rename(replaced)
        try:
            fresh.rename(target)
        except BaseException:
            if replaced.exists():
                replaced.rename(target)
            raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)
