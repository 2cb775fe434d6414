"""Whether the user asked for everything (`--debug`), and the checks of names, for the commands."""

from __future__ import annotations

import os

from keepsight.sources import as_adapter, check_sources

__all__ = ["as_adapter", "check_sources", "debugging"]


def debugging() -> bool:
    """Whether `--debug` was given."""
    return "KEEPSIGHT_DEBUG" in os.environ
