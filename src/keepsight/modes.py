"""File modes: what is saved may be read by whom the umask lets read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def readable(files: Iterable[Path]) -> None:
    """Give files that were just written the mode of any other new file, as the umask says (0644 under the usual 022).

    safetensors writes for the owner alone: a memory that is copied, or served by another user, could not be read.

    Args:
        files: a symbolic link is left alone, and so is what it points to.
    """
    weights = [path for path in files if not path.is_symlink()]
    if not weights:
        return
    probe = weights[0].with_name(f".mode-{os.getpid()}-{threading.get_ident()}")
    probe.touch()  # the umask itself can be read only by changing it, for all threads
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in weights:
        with suppress(PermissionError):  # a disk that keeps no modes
            path.chmod(mode)
