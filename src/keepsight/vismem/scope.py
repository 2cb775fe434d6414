"""What is in force in the current thread or task. Nothing here is kept on a model or in a module's state.

Every scope is a context variable: set inside a `with` block, gone after it, also after an exception, and invisible to
other threads that use the same model at the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from keepsight.vismem.module import LowRankBank


@dataclass
class Splice:
    """Latents for one call of the input embedding.

    Attributes:
        mask: bool [B, T], true at memory positions.
        values: [n, D], the latents of those positions, row by row.
    """

    mask: torch.Tensor
    values: torch.Tensor


@dataclass
class Watch:
    """What the hooks see pass by while text is generated.

    Attributes:
        hidden: the decoder's last hidden states [B, T, D] of the latest call, after the final norm.
        vision_calls: arguments of the vision encoder's blocks, one dict per call of the encoder.
    """

    hidden: torch.Tensor | None = None
    vision_calls: list[dict[str, Any]] = field(default_factory=list)


#: Only the base computes: adapters of every kind keep out (a memory is being formed).
_base_only: ContextVar[bool] = ContextVar("keepsight_vismem_base_only", default=False)
#: The low-rank updates in force in the decoder.
_bank: ContextVar[LowRankBank | None] = ContextVar("keepsight_vismem_bank", default=None)
_splice: ContextVar[Splice | None] = ContextVar("keepsight_vismem_splice", default=None)
_watch: ContextVar[Watch | None] = ContextVar("keepsight_vismem_watch", default=None)
_only_words: ContextVar[bool] = ContextVar("keepsight_vismem_only_words", default=False)
_silent: ContextVar[bool] = ContextVar("keepsight_vismem_silent", default=False)
#: What stands in for the memories that are formed.
_change: ContextVar[Callable[[str, torch.Tensor], torch.Tensor] | None] = ContextVar(
    "keepsight_vismem_change", default=None
)


@contextlib.contextmanager
def _setting(variable: ContextVar[Any], value: Any) -> Iterator[Any]:
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def base_only() -> contextlib.AbstractContextManager[bool]:
    """The base alone computes; PEFT layers of other adapters pass their base layer's output through."""
    return _setting(_base_only, True)


def low_rank(bank: LowRankBank) -> contextlib.AbstractContextManager[LowRankBank]:
    """The decoder computes with the updates of `bank`."""
    return _setting(_bank, bank)


def spliced(mask: torch.Tensor, values: torch.Tensor) -> contextlib.AbstractContextManager[Splice]:
    """The next calls of the input embedding get latents at memory positions."""
    return _setting(_splice, Splice(mask, values))


def watching() -> contextlib.AbstractContextManager[Watch]:
    """The hooks record what passes by."""
    return _setting(_watch, Watch())


def only_words() -> contextlib.AbstractContextManager[bool]:
    """The caller knows that no special token is among the ids, so the embedding need not look for them."""
    return _setting(_only_words, True)


def are_only_words() -> bool:
    """Whether the ids are known to hold no special token."""
    return _only_words.get()


def silent() -> contextlib.AbstractContextManager[bool]:
    """The model is its base: no special tokens, no memory."""
    return _setting(_silent, True)


def replace_latents(
    change: Callable[[str, torch.Tensor], torch.Tensor],
) -> contextlib.AbstractContextManager[Callable[[str, torch.Tensor], torch.Tensor]]:
    """Other contents: whenever memories are formed, `change` says what is spliced in instead.

    Args:
        change: (kind, latents [B, N, D]) -> latents of the same shape.
    """
    return _setting(_change, change)


def current_change() -> Callable[[str, torch.Tensor], torch.Tensor] | None:
    """What stands in for memories, or None."""
    return _change.get()


def is_base_only() -> bool:
    """Whether only the base computes."""
    return _base_only.get()


def current_bank() -> LowRankBank | None:
    """The low-rank updates in force, or None (always, outside a formation)."""
    return _bank.get()


def current_splice() -> Splice | None:
    """The latents waiting for the input embedding."""
    return _splice.get()


def current_watch() -> Watch | None:
    """Where to record; None while a memory is being formed."""
    return None if _base_only.get() else _watch.get()


def is_silent() -> bool:
    """Whether the memory keeps out altogether."""
    return _silent.get()


def enter_again(bank: LowRankBank) -> None:
    """Set the scope of a formation for a layer that is recomputed (gradient checkpointing); see `leave_again`."""
    _base_only.set(True)
    _bank.set(bank)


def leave_again() -> None:
    """Undo `enter_again`."""
    _base_only.set(False)
    _bank.set(None)
