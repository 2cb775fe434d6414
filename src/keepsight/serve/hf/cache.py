"""Rows that join, leave and share one KV cache: what continuous batching does to transformers' own cache.

Rows are aligned on the right: all end at slot T - 1, and a row of length n begins at slot T - n. So all rows can be fed
together, a row joins by padding on the left, and the batch is never longer than its longest row.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from keepsight.pvm.cache import VisualCache

_STATES = ("conv_states", "recurrent_states")


def can_share(cache: Any) -> bool:
    """Whether rows of this cache can join others: dynamic softmax attention, and linear attention. Sliding windows and
    caches of other kinds cannot, and their rows run alone."""
    return all(type(layer) in (DynamicLayer, LinearAttentionLayer) for layer in cache.layers)


def can_rewind(cache: Any) -> bool:
    """Whether `rewind` works: it does where nothing is ever overwritten."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def join(cache: Any, lengths: tuple[int, int], other: Any) -> None:
    """Add the rows of `other` after those of `cache`, in place. `other` must not be used any more.

    Args:
        cache: B rows of T slots.
        lengths: (T, T') slots of both.
        other: B' rows of T' slots.
    """
    total = max(lengths)
    left, right = (total - length for length in lengths)
    mine, theirs = VisualCache.of(cache), VisualCache.of(other)
    rows, more = len(_keys(cache)), len(_keys(other))
    for layer, new in zip(cache.layers, other.layers, strict=True):
        if isinstance(layer, LinearAttentionLayer):
            for name in _STATES:
                state, added = getattr(layer, name), getattr(new, name)
                for key in state:
                    if state[key] is not None:
                        state[key] = torch.cat([state[key], added[key]])
        else:
            layer.keys = torch.cat([_pad(layer.keys, left), _pad(new.keys, right)])
            layer.values = torch.cat([_pad(layer.values, left), _pad(new.values, right)])
    if mine is not None or theirs is not None:
        VisualCache.joined([(mine, left, rows), (theirs, right, more)]).attach(cache)


def keep(cache: Any, rows: list[int], cut: int) -> None:
    """Keep (or repeat) `rows` of a cache and drop its first `cut` slots, in place."""
    cache.reorder_cache(torch.tensor(rows, device=_keys(cache).device))
    for layer in cache.layers:
        if cut and isinstance(layer, DynamicLayer):
            # Copies, so that what was cut off is freed.
            layer.keys, layer.values = layer.keys[..., cut:, :].clone(), layer.values[..., cut:, :].clone()

    visual = VisualCache.of(cache)
    if visual is not None:
        visual.drop_first(cut)


def copied(cache: Any) -> Any:
    """Another cache of the same tensors: what happens to one does not happen to the other."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    visual = VisualCache.of(cache)
    if visual is not None:
        visual.copy().attach(other)
    return other


def rewind(cache: Any, length: int) -> None:
    """Undo a step that failed half-way: some layers have its keys, others not."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _keys(cache: Any) -> torch.Tensor:
    return next(layer.keys for layer in cache.layers if isinstance(layer, DynamicLayer))


def _pad(states: torch.Tensor, left: int) -> torch.Tensor:
    """[B, H, T, d] with `left` empty slots before."""
    return F.pad(states, (0, 0, left, 0)) if left else states
