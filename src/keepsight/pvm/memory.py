"""The visual memory of a batch of sequences: what is remembered, how it grows, how it follows the KV cache.

`VisualMemory` travels in the arguments of one decoder call. Between calls, what must survive (the projected keys and
values of every block, and where each visual token stood) lives in a `VisualCacheLayer`, an extra entry at the end of
the model's own KV cache: beam search, sampling with several sequences and row selection reorder it like every other
layer, and it is freed with the cache.

A *slot* is an index into the cached sequence: padding, text and visual tokens each take one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from keepsight.compat import StatelessLayer

#: fn(embeds [B, M, D], valid [B, M]) -> embeds [B, M, D]
Replacement = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

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


class VisualCacheLayer(StatelessLayer):
    """An extra entry of `Cache.layers` that holds the projected visual keys and values of every PVM block.

    Attributes:
        states: block name -> (keys, values), each [B, H_kv, M, d], detached.
        valid: bool [B, M]; false where a row has fewer visual tokens than the longest.
        slots: long [B, M], the slot of each visual token.
        is_full: every entry of `valid` is true, known without asking the device.
        end: one past the last remembered slot.
    """

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any):
        # keys/values stay None: they are what transformers reads of a layer that stores no sequence states.
        self.is_initialized, self.keys, self.values = True, None, None
        self.reset()

    @staticmethod
    def of(cache: Any) -> VisualCacheLayer | None:
        """The visual entry of a transformers cache, if it has one."""
        return next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, VisualCacheLayer)), None)

    def reset(self) -> None:
        """Forget everything (a static cache is reset before it serves another request)."""
        self.states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.valid: torch.Tensor | None = None
        self.slots: torch.Tensor | None = None
        self.is_full, self.end = True, 0

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {name: (fn(key), fn(value)) for name, (key, value) in self.states.items()}
        if self.valid is not None and self.slots is not None:
            self.valid, self.slots = fn(self.valid), fn(self.slots)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams: row i continues what row `beam_idx[i]` [B] was."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` [B']."""
        self._map(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def truncate(self, length: int) -> None:
        """Forget visual tokens at slots >= `length`: what a `crop` of the other layers has removed."""
        if length < self.end and self.valid is not None and self.slots is not None:
            self.valid = self.valid & (self.slots < length)
            self.is_full, self.end = False, length

    # A crop reaches this layer without saying how long the sequence was, so it is caught up with by `truncate` at the
    # next call, when the length is known. The rest of the cache-layer interface has nothing to do here.
    def crop(self, tokens_to_remove: int) -> None:
        """Nothing now; see `truncate`."""

    def offload(self) -> None:
        """Nothing: a few MB per image stay on the device."""

    def prefetch(self) -> None:
        """Nothing: never offloaded."""

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to allocate ahead of the first image."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[None, None]:
        """No decoder layer writes here."""
        return None, None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of an empty layer."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """As of an empty layer."""
        return 0


def swap_memory(cache: Any, donor: Any) -> None:
    """From now on, the sequences in `cache` remember what those in `donor` saw: the tool of half-way experiments.

    Only the PVM branches' memory changes hands; the KV cache of the decoder itself stays as it is. `donor` is left
    unchanged. Row i gets row i's memory.

    Args:
        cache: the transformers cache of a generation under way, whose model carries a PVM.
        donor: a cache in which the same model has read other images, for as many rows.

    Raises:
        ValueError: if one of them holds no visual memory, or the numbers of rows differ.
    """
    mine, theirs = VisualCacheLayer.of(cache), VisualCacheLayer.of(donor)
    for name, layer in (("cache", mine), ("donor", theirs)):
        if layer is None or layer.valid is None or layer.slots is None:
            raise ValueError(f"swap_memory: {name} holds no visual memory; its model has no PVM or saw no image.")
    assert mine is not None
    assert mine.valid is not None
    assert theirs is not None
    assert theirs.valid is not None
    assert theirs.slots is not None
    if len(mine.valid) != len(theirs.valid):
        raise ValueError(f"swap_memory: cache has {len(mine.valid)} rows and donor {len(theirs.valid)}.")
    mine.states = {name: (key.clone(), value.clone()) for name, (key, value) in theirs.states.items()}
    mine.valid, mine.is_full = theirs.valid.clone(), theirs.is_full
    mine.slots = theirs.slots.clamp(max=mine.end - 1)  # a crop of this cache must not forget them by the donor's slots


class VisualMemory:
    """What one decoder call carries: the new images' embeddings, and what the cache remembers of earlier ones.

    Built in the decoder's pre-hook, read by every block, written back to the cache after the call. It is never kept
    longer than the call (and its recomputation under gradient checkpointing).

    Args:
        embeds: what enters the decoder [B, T, D]; needed with `visual_mask`.
        visual_mask: bool [B, T], true at visual positions of this call; None if there are none.
        past: the cache's visual entry, if there is one.
        start: slot of this call's first position, i.e. the cached length so far.
    """

    def __init__(
        self,
        embeds: torch.Tensor | None = None,
        visual_mask: torch.Tensor | None = None,
        past: VisualCacheLayer | None = None,
        start: int = 0,
    ):
        self.past = past if past is not None and past.valid is not None else None
        self.start, self.visual_mask = start, visual_mask
        self.embeds: torch.Tensor | None = None  # [B, M, D], packed
        self._single_span = False
        self._views: dict[tuple[bool, int], tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._new_states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if visual_mask is not None:
            assert embeds is not None
            self._pack(embeds, visual_mask)
        else:
            assert self.past is not None
            self.valid, self.slots = self.past.valid, self.past.slots
            self.is_full, self.end = self.past.is_full, self.past.end

    def _pack(self, embeds: torch.Tensor, visual_mask: torch.Tensor) -> None:
        """Gather the visual rows of [B, T, D] into [B, M, D], padded on the right to the longest row."""
        count = visual_mask.sum(1)
        position = torch.arange(visual_mask.shape[1], device=visual_mask.device)
        first = torch.where(visual_mask, position, visual_mask.shape[1]).min(1).values
        last = torch.where(visual_mask, position, -1).max(1).values
        counts, firsts, lasts = torch.stack([count, first, last]).tolist()  # the only wait for the device
        longest = max(counts)
        index = torch.argsort((~visual_mask).to(torch.uint8), dim=1, stable=True)[:, :longest]
        valid = position[:longest] < count[:, None]
        packed = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        packed = packed.masked_fill(~valid[..., None], 0)
        replace = _replacement.get()
        if replace is not None:
            shape, packed = packed.shape, replace(packed, valid)
            if packed.shape != shape:
                raise ValueError(
                    f"replace_memory's function returned shape {tuple(packed.shape)}; it must return visual "
                    f"embeddings of the shape it was given, {tuple(shape)}."
                )
        self.embeds = packed
        slots = index + self.start
        is_full = min(counts) == longest
        self.end = self.start + max(lasts) + 1
        if self.past is None:
            self.valid, self.slots, self.is_full = valid, slots, is_full
            self._single_span = is_full and all(b - a + 1 == n for n, a, b in zip(counts, firsts, lasts, strict=True))
        else:
            assert self.past.valid is not None
            assert self.past.slots is not None
            self.valid = torch.cat([self.past.valid.to(valid.device), valid], 1)
            self.slots = torch.cat([self.past.slots.to(slots.device), slots], 1)
            self.is_full = is_full and self.past.is_full

    def view(self, length: int, causal: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What each of this call's `length` positions may retrieve.

        Args:
            length: T, positions in this call.
            causal: a position sees the visual tokens before it; otherwise all of its row (the published rule).

        Returns:
            mask: bool [B, 1, T or 1, M] for the attention, or None if nothing needs hiding. A position that sees
                nothing gets an open row (no NaN) and is silenced by `keep`.
            keep: bool [B, T or 1, 1], true where the branch may speak: text positions that see something. None if
                it may everywhere.
        """
        key = (causal, length)
        if key not in self._views:
            self._views[key] = self._make_view(length, causal)
        return self._views[key]

    def _make_view(self, length: int, causal: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self.visual_mask is None:  # decoding: everything remembered lies before every position of this call
            if self.is_full:
                return None, None
            assert self.valid is not None
            visible = self.valid[:, None]  # [B, 1, M]
        else:
            assert self.valid is not None
            assert self.slots is not None
            visible = self.valid[:, None]
            if causal:
                query = self.start + torch.arange(length, device=self.slots.device)
                visible = visible & (self.slots[:, None] < query[:, None])  # [B, T, M]
        alive = visible.any(-1, keepdim=True)
        keep = alive if self.visual_mask is None else alive & ~self.visual_mask[..., None]
        if self._single_span or (self.is_full and not causal):
            # One unbroken run of visual tokens per row: a text position sees all of them or none.
            return None, keep
        return (visible | ~alive)[:, None], keep

    def states(
        self, name: str, project: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values [B, H_kv, M, d] of one block, projecting only images that are new in this call.

        Args:
            name: the block's name, unique in the model.
            project: maps visual embeddings [B, M, D] to keys and values.

        Returns:
            None if the block has nothing stored for earlier images (it was switched on after they were read).
        """
        past = self.past.states.get(name) if self.past is not None else None
        if self.past is not None and past is None:
            return None
        if self.embeds is None:
            return past
        key, value = project(self.embeds)
        if past is not None:
            key = torch.cat([past[0].to(key.device), key], 2)
            value = torch.cat([past[1].to(value.device), value], 2)
        # Detached: a cache that held the graph would keep it alive, and a checkpoint's closure would hold itself.
        self._new_states[name] = (key.detach(), value.detach())
        return key, value

    def store(self, cache: Any) -> None:
        """Write this call's projections to `cache`, as its last layer. Nothing to do in a decoding step."""
        if not self._new_states:
            return
        layer = VisualCacheLayer.of(cache)
        if layer is None:
            layer = VisualCacheLayer()
            cache.layers.append(layer)
        layer.states = dict(self._new_states)
        layer.valid, layer.slots, layer.is_full, layer.end = self.valid, self.slots, self.is_full, self.end
