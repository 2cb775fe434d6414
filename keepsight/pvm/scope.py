"""Switching the memory off for one thread or task, while others use the same model with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_silent: ContextVar[bool] = ContextVar("keepsight_pvm_silent", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """The model is its base, in the current thread or task only; nothing on the model changes.

    `memory_off` switches the modules themselves off, for everybody; a server, whose requests differ, needs this one.
    """
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def is_silent() -> bool:
    """Whether the memory keeps out altogether."""
    return _silent.get()
