"""Switching the memory off for one thread, while others use the same model with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Scope(threading.local):
    """Of one thread. Not a context variable: torch before 2.12 cannot compile a decoder that reads one."""

    silent = False


_scope = Scope()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The model is its base, in the current thread only; nothing on the model changes.

    `memory_off` switches the modules themselves off, for everybody; a server, whose requests differ, needs this one.
    """
    before, _scope.silent = _scope.silent, True
    try:
        yield
    finally:
        _scope.silent = before


def is_silent() -> bool:
    """Whether the memory keeps out altogether."""
    return _scope.silent
