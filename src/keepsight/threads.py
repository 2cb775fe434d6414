"""What each thread has for itself, kept so that torch.compile can follow it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerThread(threading.local, Generic[T]):
    """One object for each thread.

    A thread-local that holds the object, and no attributes of its own: where torch.compile splits a forward in two (a
    graph break, of which most vision encoders have some), what was set on the thread-local itself is lost in between,
    and what was set on an ordinary object is not. And no context variable, which torch before 2.12 cannot compile.

    Args:
        make: makes the object of a thread that has none yet.

    Attributes:
        here: the current thread's.
    """

    def __init__(self, make: Callable[[], T]):
        self.here = make()


class Switch:
    """What each thread has off until one of its scopes puts it on: to be held in a `PerThread`."""

    on = False
