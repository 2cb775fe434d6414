"""Rows that join, leave and share one KV cache: what continuous batching does to transformers' own cache.

Rows are aligned on the right: all end at slot T - 1, and a row of length n begins at slot T - n. So all rows can be fed
together, a row joins by padding on the left, and the batch is never longer than its longest row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from keepsight.pvm.memory import VisualCacheLayer

_STATES = ("conv_states", "recurrent_states")


def can_share(cache: Any) -> bool:
    """Whether rows of this cache can join others: dynamic softmax attention, and linear attention. Sliding windows and
    caches of other kinds cannot, and their rows run alone."""
    return all(type(layer) in (DynamicLayer, LinearAttentionLayer, VisualCacheLayer) for layer in cache.layers)


def can_rewind(cache: Any) -> bool:
    """Whether `rewind` works: it does where nothing is ever overwritten."""
    return all(type(layer) in (DynamicLayer, VisualCacheLayer) for layer in cache.layers)


def join(cache: Any, lengths: tuple[int, int], other: Any) -> None:
    """Add the rows of `other` after those of `cache`, in place. `other` must not be used any more.

    Args:
        cache: B rows of T slots.
        lengths: (T, T') slots of both.
        other: B' rows of T' slots.
    """
    total = max(lengths)
    left, right = (total - length for length in lengths)
    mine, theirs = _take_visual(cache), _take_visual(other)
    rows, more = _rows(cache), _rows(other)
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
        cache.layers.append(_join_visual((mine, left, rows), (theirs, right, more)))


def keep(cache: Any, rows: list[int], cut: int) -> None:
    """Keep (or repeat) `rows` of a cache and drop its first `cut` slots, in place."""
    index = torch.tensor(rows, device=_keys(cache).device)
    for layer in cache.layers:
        layer.reorder_cache(index)
        if cut and isinstance(layer, DynamicLayer):
            # Copies, so that what was cut off is freed.
            layer.keys, layer.values = layer.keys[..., cut:, :].clone(), layer.values[..., cut:, :].clone()
        elif isinstance(layer, VisualCacheLayer):
            _trim_visual(layer, cut)


def rewind(cache: Any, length: int) -> None:
    """Undo a step that failed half-way: some layers have its keys, others not."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def _keys(cache: Any) -> torch.Tensor:
    return next(layer.keys for layer in cache.layers if isinstance(layer, DynamicLayer))


def _rows(cache: Any) -> int:
    return len(_keys(cache))


def _pad(states: torch.Tensor, left: int) -> torch.Tensor:
    """[B, H, T, d] with `left` empty slots before."""
    return F.pad(states, (0, 0, left, 0)) if left else states


def _take_visual(cache: Any) -> VisualCacheLayer | None:
    layer = VisualCacheLayer.of(cache)
    if layer is not None:
        cache.layers.remove(layer)
    return layer if layer is not None and layer.states else None


def _join_visual(*parts: tuple[VisualCacheLayer | None, int, int]) -> VisualCacheLayer:
    """One layer for all rows; rows that saw no image get empty entries, which nobody can see.

    Args:
        parts: (layer or None, slots that were added on the left, rows).
    """
    present = [layer for layer, _, _ in parts if layer is not None]
    like = present[0]
    assert like.valid is not None
    longest = max(layer.valid.shape[1] for layer in present if layer.valid is not None)
    joined = VisualCacheLayer()
    valid, slots = [], []
    for layer, left, rows in parts:
        if layer is None:
            valid.append(like.valid.new_zeros(rows, longest))
            slots.append(torch.zeros(rows, longest, dtype=torch.long, device=like.valid.device))
        else:
            assert layer.valid is not None
            assert layer.slots is not None
            missing = longest - layer.valid.shape[1]
            valid.append(F.pad(layer.valid, (0, missing)))
            slots.append(F.pad(layer.slots + left, (0, missing)))
    joined.valid, joined.slots = torch.cat(valid), torch.cat(slots)
    for name, states in like.states.items():
        both = []
        for which in (0, 1):
            pieces = []
            for layer, _, rows in parts:
                if layer is None:
                    _, heads, _, width = states[which].shape
                    pieces.append(states[which].new_zeros(rows, heads, longest, width))
                else:
                    state = layer.states[name][which]
                    pieces.append(F.pad(state, (0, 0, 0, longest - state.shape[2])))
            both.append(torch.cat(pieces))
        joined.states[name] = (both[0], both[1])
    _settle(joined)
    return joined


def _trim_visual(layer: VisualCacheLayer, cut: int) -> None:
    """Drop entries that no row has any more, and move slots after a cut on the left."""
    if layer.valid is None or layer.slots is None:
        return
    longest = int(layer.valid.sum(1).max())
    # Valid entries come first in every row, because images are only ever appended.
    layer.valid, layer.slots = layer.valid[:, :longest].clone(), (layer.slots[:, :longest] - cut).clamp(min=0)
    layer.states = {
        name: (k[:, :, :longest].clone(), v[:, :, :longest].clone()) for name, (k, v) in layer.states.items()
    }
    if not longest:
        layer.reset()
    else:
        _settle(layer)


def _settle(layer: VisualCacheLayer) -> None:
    assert layer.valid is not None
    assert layer.slots is not None
    layer.is_full = bool(layer.valid.all())
    layer.end = int(layer.slots.masked_fill(~layer.valid, 0).max()) + 1
