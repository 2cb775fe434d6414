"""The visual memory of one decoder call: its own images, and those that its KV cache remembers.

`VisualMemory` travels in the arguments of one decoder call. Between calls, what must survive lives in the KV cache
(`cache.py`, which also says what a *slot* is).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.pvm.cache import VisualCache
from keepsight.pvm.packing import Packing, require_kept_apart
from keepsight.pvm.scope import replaced


class VisualMemory:
    """What one decoder call carries: the new images' embeddings, and what the cache remembers of earlier ones.

    Built in the decoder's pre-hook, read by every block, written back to the cache after the call. It is never kept
    longer than the call (and its recomputation under gradient checkpointing). Without any image it says that the
    memory is on, and empty; a block that gets none at all is off.

    Args:
        embeds: what enters the decoder [B, T, D]; needed with `visual_mask`.
        visual_mask: bool [B, T], true at visual positions of this call; None if there are none.
        past: what the KV cache remembers, if there is one.
        start: slot of this call's first position, i.e. the cached length so far.
        packing: which sample of a row each position belongs to, where several may be packed into one.
    """

    def __init__(
        self,
        embeds: torch.Tensor | None = None,
        visual_mask: torch.Tensor | None = None,
        past: VisualCache | None = None,
        start: int = 0,
        packing: Packing | None = None,
    ):
        self.past = past if past is not None and past.valid is not None else None
        self.start, self.visual_mask = start, visual_mask
        self.embeds: torch.Tensor | None = None  # [B, M, D], packed
        self._single_span = False
        self._samples: torch.Tensor | None = None  # [B, T], where samples are packed
        self._views: dict[tuple[bool, int], tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        self._new_states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if visual_mask is not None:
            assert embeds is not None
            self._pack(embeds, visual_mask, packing)
        else:
            last = self.past or VisualCache()
            self.valid, self.slots = last.valid, last.slots
            self.is_full, self.end = last.is_full, last.end

    def _pack(self, embeds: torch.Tensor, visual_mask: torch.Tensor, packing: Packing | None) -> None:
        """Gather the visual rows of [B, T, D] into [B, M, D], padded on the right to the longest row."""
        count = visual_mask.sum(1)
        position = torch.arange(visual_mask.shape[1], device=visual_mask.device)
        first = torch.where(visual_mask, position, visual_mask.shape[1]).min(1).values
        last = torch.where(visual_mask, position, -1).max(1).values
        boundaries = torch.zeros_like(count) if packing is None else packing.samples[:, -1].to(count)
        counts, firsts, lasts, samples = torch.stack([count, first, last, boundaries]).tolist()  # the only wait
        if packing is not None and any(samples):
            packing.require_apart()
            self._samples = packing.samples
        longest = max(counts)
        index = torch.argsort((~visual_mask).to(torch.uint8), dim=1, stable=True)[:, :longest]
        valid = position[:longest] < count[:, None]
        packed = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        packed = packed.masked_fill(~valid[..., None], 0)
        self.embeds = packed = replaced(packed, valid)
        slots = index + self.start
        is_full = min(counts) == longest
        self.end = self.start + max(lasts) + 1
        if self.past is None:
            self.valid, self.slots, self.is_full = valid, slots, is_full
            unpacked = is_full and self._samples is None
            self._single_span = unpacked and all(b - a + 1 == n for n, a, b in zip(counts, firsts, lasts, strict=True))
        else:
            assert self.past.valid is not None
            assert self.past.slots is not None
            self.valid = torch.cat([self.past.valid.to(valid.device), valid], 1)
            self.slots = torch.cat([self.past.slots.to(slots.device), slots], 1)
            self.is_full = is_full and self.past.is_full

    def check_attention(self, arguments: dict[str, Any], text_config: Any) -> None:
        """Raises KeepsightError if a layer's attention mixes packed samples.

        Args:
            arguments: keyword arguments of the attention.
            text_config: the decoder's configuration.
        """
        if self._samples is not None:
            require_kept_apart(self._samples, arguments, text_config, self.start)

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
            if self._samples is not None:
                visible = visible & (self._samples.gather(1, self.slots)[:, None] == self._samples[..., None])
        alive = visible.any(-1, keepdim=True)
        keep = alive if self.visual_mask is None else alive & ~self.visual_mask[..., None]
        if self._single_span or (self.is_full and not causal and self._samples is None):
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
            None if there are no images.

        Raises:
            KeepsightError: if the block has nothing stored for earlier images: it was switched on after they were read.
        """
        past = self.past.states.get(name) if self.past is not None else None
        if self.past is not None and past is None:
            raise KeepsightError(
                f"The visual memory {name.partition('.')[2]!r} was switched on after the images were read, so decoder "
                f"layer {name.partition('.')[0]} has nothing to retrieve: the KV cache holds visual positions and no "
                "keys and values of this memory for them. Activate it before the prompt is read."
            )
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
        """Write this call's projections to a KV cache. Nothing to do in a decoding step."""
        if self.visual_mask is None:
            return
        kept = VisualCache.of(cache) or VisualCache()
        kept.states = dict(self._new_states)
        kept.valid, kept.slots, kept.is_full, kept.end = self.valid, self.slots, self.is_full, self.end
        kept.attach(cache)
