"""Commands of ours in processes of their own."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def interruptible(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command that Ctrl-C reaches.

    Whoever runs the tests in a shell's background has SIGINT ignored, and processes inherit that.
    """
    return subprocess.Popen(
        command, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
    )
