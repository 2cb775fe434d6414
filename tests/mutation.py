"""A release of transformers that does not exist: a tiny model in which one call happens in another way.

What keepsight's routes depend on are names and calls in others' code. A stand-in changes one of them between caller and
callee: hooks see the changed call, the module itself computes what it always did.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache, DynamicCache

Arguments = dict[str, Any]


def stand_in(
    module: Any,
    outside: Callable[[Arguments], Arguments] = lambda given: given,
    inside: Callable[[Arguments], Arguments] = lambda given: given,
    result: Callable[[Any], Any] | None = None,
    hooks: bool = True,
) -> None:
    """Change how a module is called, in place; before a memory is attached, as an installed release would.

    Args:
        module: the module.
        outside: what the caller gives, as hooks are to see it.
        inside: the way back, for the module's own code.
        result: what the module returns, as hooks are to see it; the caller gets what it always did.
        hooks: whether its hooks are called at all.
    """
    kind: Any = type(module)
    own: list[Any] = []  # what the calls in progress returned

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hooks:
            return self.forward(*args, **kwargs)
        output = kind.__call__(self, *args, **outside(kwargs))
        return output if result is None else own.pop()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **inside(kwargs))
        if result is None:
            return output
        own.append(output)
        return result(output)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    module.__class__ = type(
        kind.__name__, (kind,), {"__call__": call, "forward": forward, "__module__": kind.__module__}
    )


def renamed(module: Any, old: str, new: str) -> None:
    """A keyword argument has another name."""
    stand_in(
        module,
        lambda given: {new if name == old else name: value for name, value in given.items()},
        lambda given: {old if name == new else name: value for name, value in given.items()},
    )


class Box:
    """Holds a KV cache, and is none."""

    def __init__(self, cache: Cache):
        self.cache = cache


def boxed(given: Arguments) -> Arguments:
    """Caches in boxes."""
    return {name: Box(value) if isinstance(value, Cache) else value for name, value in given.items()}


def unboxed(given: Arguments) -> Arguments:
    """The way back."""
    return {name: value.cache if isinstance(value, Box) else value for name, value in given.items()}


def copied(given: Arguments) -> Arguments:
    """Caches as new caches of the same layers."""
    found = dict(given)
    for name, value in given.items():
        if isinstance(value, Cache):
            found[name] = DynamicCache()
            found[name].layers = value.layers
    return found


def without(*names: str) -> Callable[[Arguments], Arguments]:
    """Without some keyword arguments."""
    return lambda given: {name: value for name, value in given.items() if name not in names}
