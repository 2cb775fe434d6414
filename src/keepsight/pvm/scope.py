"""Context managers around calls: replace visual embeddings, or say where they stand."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from keepsight.errors import KeepsightError, KeepsightWarning

#: fn(embeds [B, M, D], valid [B, M]) -> embeds [B, M, D]
Replacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Read only where an image is read or embeddings are given, never in a decoding step: torch.compile meets neither.
_replacement: ContextVar[Replacement | None] = ContextVar("keepsight_pvm_replacement", default=None)


@contextlib.contextmanager
def replace_memory(fn: Replacement) -> Iterator[None]:
    """Give the memory other visual embeddings than the model saw: the tool of causal experiments.

    The decoder itself still reads the true image; only what the PVM branch remembers changes. Scoped to the `with`
    block and to the current thread or task.

    Args:
        fn: called once per image-bearing call with the packed visual embeddings [B, M, D] and their validity mask
            [B, M]; returns what to remember instead, same shape.

    Example:
        >>> with replace_memory(lambda embeds, valid: torch.randn_like(embeds)):
        ...     model.generate(**inputs)
    """
    token = _replacement.set(fn)
    try:
        yield
    finally:
        _replacement.reset(token)


def replaced(packed: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """What to remember in place of the packed visual embeddings [B, M, D], which are valid at [B, M]."""
    replace = _replacement.get()
    if replace is None:
        return packed
    other = replace(packed, valid)
    if other.shape != packed.shape:
        raise ValueError(
            f"replace_memory's function returned shape {tuple(other.shape)}; it must return visual "
            f"embeddings of the shape it was given, {tuple(packed.shape)}."
        )
    return other


class _Positions:
    def __init__(self, mask: torch.Tensor):
        self.mask, self.used = mask, False


_positions: ContextVar[_Positions | None] = ContextVar("keepsight_pvm_positions", default=None)


@contextlib.contextmanager
def visual_positions(mask: torch.Tensor) -> Iterator[None]:
    """Say where the images stand in `inputs_embeds` that already hold them.

    A model that is given pixels shows the memory where they go. One that is given finished embeddings does not: they
    are rows of numbers, and no row says that it came from an image. Scoped to the `with` block and to the current
    thread or task.

    Args:
        mask: bool [B, T], true at image and video positions of the whole prompt. All false: there is no image in it.

    Raises:
        KeepsightError: if `mask` is not such a mask, or does not fit the embeddings of a call.

    Example:
        >>> with visual_positions(input_ids == model.config.image_token_id):
        ...     model.generate(inputs_embeds=embeds, attention_mask=attention_mask)
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise KeepsightError(
            f"visual_positions: found {mask.dtype} of shape {tuple(mask.shape)}; expected a bool mask [B, T], true "
            "where an image stands."
        )
    given = _Positions(mask)
    token = _positions.set(given)
    try:
        yield
    finally:
        _positions.reset(token)
    if not given.used:
        warnings.warn(
            "visual_positions was used by no call: none was given inputs_embeds while a visual memory was on.",
            KeepsightWarning,
            stacklevel=3,
        )


def positions_given() -> bool:
    """Whether a caller has said where images stand."""
    return _positions.get() is not None


def positions_at(start: int, batch: int, length: int) -> torch.Tensor:
    """Where images stand [B, T] in a call of `length` positions from slot `start` on, for `batch` rows."""
    given = _positions.get()
    assert given is not None
    mask = given.mask
    if mask.shape[0] and batch % mask.shape[0] == 0:  # several sequences or beams per prompt
        mask = mask.repeat_interleave(batch // mask.shape[0], 0)
    part = mask[:, start : start + length]
    if part.shape != (batch, length):
        raise KeepsightError(
            f"visual_positions: the mask has shape {tuple(given.mask.shape)}, and a call was given inputs_embeds of "
            f"{batch} rows at positions {start} to {start + length - 1}. The mask must cover the whole prompt, [B, T]."
        )
    given.used = True
    return part
