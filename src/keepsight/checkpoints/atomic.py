"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write beside the file, then put it in its place: a reader finds the old text or the new one, never a part.

    Args:
        file: its folder must be there.
        text: written as UTF-8.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


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
