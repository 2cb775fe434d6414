"""What is in force in the current thread. Nothing here is kept on a model or in a module's state.

One `Call` a thread. Every scope sets some of it inside a `with` block and puts back what was there, also after an
exception; other threads that use the same model at the same time see nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.threads import PerThread
from keepsight.vismem.module import LowRankBank

#: Keyword argument with which the decoder's layers are told the adapter, for gradient checkpointing.
BANK = "keepsight_vismem_bank"
#: (kind, latents [B, N, D]) -> latents of the same shape.
Change = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass
class Splice:
    """Latents for the calls of the input embedding.

    Attributes:
        mask: bool [B, T], true at memory positions.
        values: [n, D], the latents of those positions, row by row.
        was_used: whether an embedding call took them.
    """

    mask: torch.Tensor
    values: torch.Tensor
    was_used: bool = False


@dataclass
class Watch:
    """What the hooks see pass by while text is generated.

    Attributes:
        hidden: the decoder's last hidden states [B, T, D] of the latest call, after the final norm.
        embedded: what the decoder was given in that call: input embeddings [B, T, D].
        vision_calls: arguments of the vision encoder's blocks, one dict per call of the encoder.
    """

    hidden: torch.Tensor | None = None
    embedded: torch.Tensor | None = None
    vision_calls: list[dict[str, Any]] = field(default_factory=list)

    def take_hidden(self) -> torch.Tensor:
        """The hidden states of the call that has just been made.

        Raises:
            KeepsightError: if none passed by, so that a memory would be formed from nothing, or from an older call.
        """
        hidden, self.hidden = self.hidden, None
        if hidden is None:
            raise KeepsightError(
                "The model was called, and its decoder's hidden states (last_hidden_state of what get_decoder() "
                "returns) did not pass by: a memory has nothing to be formed from. Call the decoder as a module."
            )
        return hidden


@dataclass
class Call:
    """What is in force in one thread.

    Attributes:
        base_only: only the base computes, adapters of every kind keep out: a memory is being formed.
        bank: the low-rank updates in force in the decoder; None outside a formation.
        updates: which of them (layer, projection) were added since `bank` came into force.
        again: a decoder layer is being computed again for its gradient.
        splice: the latents that wait for the input embedding.
        watch: where to record what passes by.
        only_words: no special token is among the ids, so the embedding need not look for them.
        change: what stands in for the memories that are formed.
        ids: token ids of the embedding call in progress.
        embedded: the input embedding was called since the model's call began.
        scored: the head was called since the model's call began.
    """

    base_only: bool = False
    bank: LowRankBank | None = None
    updates: set[tuple[int, str]] = field(default_factory=set)
    again: bool = False
    splice: Splice | None = None
    watch: Watch | None = None
    only_words: bool = False
    change: Change | None = None
    ids: torch.Tensor | None = None
    embedded: bool = False
    scored: bool = False


calls = PerThread(Call)


@contextlib.contextmanager
def _setting(name: str, value: Any) -> Iterator[Any]:
    call = calls.here
    before = getattr(call, name)
    setattr(call, name, value)
    try:
        yield value
    finally:
        setattr(call, name, before)


def base_only() -> contextlib.AbstractContextManager[bool]:
    """The base alone computes; PEFT layers of other adapters pass their base layer's output through."""
    return _setting("base_only", True)


@contextlib.contextmanager
def low_rank(bank: LowRankBank) -> Iterator[LowRankBank]:
    """The decoder computes with the updates of `bank`.

    Raises:
        KeepsightError: if not all of them were added in the block: the memory would be the unadapted base's.
    """
    with _setting("bank", bank), _setting("updates", set()):
        yield bank
        added = len(calls.here.updates)
        if added != len(bank.updates):
            raise KeepsightError(
                f"{added} of the long-term former's {len(bank.updates)} low-rank updates were added while "
                "the decoder ran: some attention projections are not called as modules, once per layer."
            )


@contextlib.contextmanager
def spliced(mask: torch.Tensor, values: torch.Tensor) -> Iterator[Splice]:
    """The calls of the input embedding in this block get latents at memory positions.

    Raises:
        KeepsightError: if there are latents, and no embedding call of the mask's shape took them.
    """
    with _setting("splice", Splice(mask, values)) as splice:
        yield splice
        if len(values) and not splice.was_used:
            raise KeepsightError(
                f"{len(values)} latents were given for ids of shape {tuple(mask.shape)}, and no call of the input "
                "embedding (get_input_embeddings()) took them. Give the model input_ids of that shape, in this block."
            )


def watching() -> contextlib.AbstractContextManager[Watch]:
    """The hooks record what passes by."""
    return _setting("watch", Watch())


def only_words() -> contextlib.AbstractContextManager[bool]:
    """The caller knows that no special token is among the ids, so the embedding need not look for them."""
    return _setting("only_words", True)


def replace_latents(change: Change) -> contextlib.AbstractContextManager[Change]:
    """Other contents: whenever memories are formed, `change` says what is spliced in instead.

    Args:
        change: (kind, latents [B, N, D]) -> latents of the same shape.
    """
    return _setting("change", change)


def is_base_only() -> bool:
    """Whether only the base computes."""
    return calls.here.base_only


def current_splice() -> Splice | None:
    """The latents waiting for the input embedding."""
    return calls.here.splice


def current_watch() -> Watch | None:
    """Where to record; None while a memory is being formed."""
    return None if calls.here.base_only else calls.here.watch


def enter_again(bank: LowRankBank) -> None:
    """Set the scope of a formation for a layer that is recomputed (gradient checkpointing); see `leave_again`."""
    call = calls.here
    call.again, call.base_only, call.bank = True, True, bank


def leave_again() -> None:
    """Undo `enter_again`."""
    call = calls.here
    call.again, call.base_only, call.bank = False, False, None
