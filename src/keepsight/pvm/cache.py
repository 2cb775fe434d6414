"""Visual keys and values beside a KV cache, which follow it through selection, cropping and copies.

Between calls of the decoder a visual memory lives in the model's own KV cache: beside its layers, of which it is none
(code that counts or walks `cache.layers` finds what it expects), and yet through everything that happens to them. Beam
search, several sequences per prompt, row selection, crop and reset are methods of the cache; a cache that holds images
gets the class of the same name below, in which each of them also does its part here. Copies copy it, and it is freed
with the cache.

A *slot* is an index into the cached sequence: padding, text and visual tokens each take one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

_ATTRIBUTE = "keepsight_visual"


class VisualCache:
    """The projected visual keys and values of every PVM block, for the rows of one KV cache.

    An empty one says that the memory has read all there was, and that it was text.

    Attributes:
        states: block name -> (keys, values), each [B, H_kv, M, d], detached.
        valid: bool [B, M]; false where a row has fewer visual tokens than the longest. None if no image was read.
        slots: long [B, M], the slot of each visual token.
        is_full: every entry of `valid` is true, known without asking the device.
        end: one past the last remembered slot.
        missed: the slot at which a call began that brought an image while the memory was off; None if there was none.
    """

    def __init__(self) -> None:
        self.reset()

    @staticmethod
    def of(cache: Any) -> VisualCache | None:
        """That of a KV cache; None if no call with a memory, on or off, has used the cache."""
        return getattr(cache, _ATTRIBUTE, None)

    @staticmethod
    def mark(cache: Cache) -> VisualCache:
        """That of a KV cache, which gets an empty one if it has none."""
        found = VisualCache.of(cache)
        if found is None:
            found = VisualCache()
            setattr(cache, _ATTRIBUTE, found)
        return found

    def attach(self, cache: Cache) -> None:
        """Become that of a KV cache, and follow it from now on."""
        setattr(cache, _ATTRIBUTE, self)
        if not isinstance(cache, _Following):
            kind: Any = type(cache)
            cache.__class__ = _following(kind)

    def reset(self) -> None:
        """Forget everything (a static cache is reset before it serves another request)."""
        self.states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.valid: torch.Tensor | None = None
        self.slots: torch.Tensor | None = None
        self.is_full, self.end = True, 0
        self.missed: int | None = None

    def copy(self) -> VisualCache:
        """Another one of the same tensors; what happens to one does not happen to the other."""
        other = VisualCache()
        other.__dict__.update(self.__dict__, states=dict(self.states))
        return other

    def _map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {name: (fn(key), fn(value)) for name, (key, value) in self.states.items()}
        if self.valid is not None and self.slots is not None:
            self.valid, self.slots = fn(self.valid), fn(self.slots)

    def select(self, rows: torch.Tensor) -> None:
        """Row i continues what row `rows[i]` [B'] was."""
        self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def truncate(self, length: int) -> None:
        """Forget visual tokens at slots >= `length`, which the cache no longer holds."""
        if self.missed is not None and length <= self.missed:
            self.missed = None
        if length < self.end and self.valid is not None and self.slots is not None:
            self.valid = self.valid & (self.slots < length)
            self.is_full, self.end = False, length

    def drop_first(self, cut: int) -> None:
        """Follow a cut of the first `cut` slots, and free the entries that no row has any more."""
        if self.valid is None or self.slots is None:
            return
        longest = int(self.valid.sum(1).max())
        if not longest:
            self.reset()
            return
        # Valid entries come first in every row, because images are only ever appended.
        self.valid, self.slots = self.valid[:, :longest].clone(), (self.slots[:, :longest] - cut).clamp(min=0)
        self.states = {
            name: (key[:, :, :longest].clone(), value[:, :, :longest].clone())
            for name, (key, value) in self.states.items()
        }
        self._settle()

    def _settle(self) -> None:
        assert self.valid is not None
        assert self.slots is not None
        self.is_full = bool(self.valid.all())
        self.end = int(self.slots.masked_fill(~self.valid, 0).max()) + 1

    @staticmethod
    def joined(parts: Sequence[tuple[VisualCache | None, int, int]]) -> VisualCache:
        """One for the rows of all; rows that saw no image get empty entries, which nobody can see.

        Args:
            parts: (that of some rows, slots that were added on their left, number of the rows).
        """
        whole = VisualCache()
        whole.missed = next((p.missed for p, _, _ in parts if p is not None and p.missed is not None), None)
        seen = [part for part, _, _ in parts if part is not None and part.valid is not None]
        if not seen:
            return whole
        like = seen[0]
        assert like.valid is not None
        longest = max(part.valid.shape[1] for part in seen if part.valid is not None)
        valid, slots = [], []
        for part, left, rows in parts:
            if part is None or part.valid is None or part.slots is None:
                valid.append(like.valid.new_zeros(rows, longest))
                slots.append(torch.zeros(rows, longest, dtype=torch.long, device=like.valid.device))
            else:
                missing = longest - part.valid.shape[1]
                valid.append(F.pad(part.valid, (0, missing)))
                slots.append(F.pad(part.slots + left, (0, missing)))
        whole.valid, whole.slots = torch.cat(valid), torch.cat(slots)
        for name, states in like.states.items():
            both = []
            for which in (0, 1):
                pieces = []
                for part, _, rows in parts:
                    if part is None or part.valid is None:
                        _, heads, _, width = states[which].shape
                        pieces.append(states[which].new_zeros(rows, heads, longest, width))
                    else:
                        state = part.states[name][which]
                        pieces.append(F.pad(state, (0, 0, 0, longest - state.shape[2])))
                both.append(torch.cat(pieces))
            whole.states[name] = (both[0], both[1])
        whole._settle()
        return whole


class _Following:
    """Mixed into the class of a cache that holds images: what happens to its layers happens to them."""

    keepsight_visual: VisualCache

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.keepsight_visual.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.keepsight_visual.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.keepsight_visual.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.keepsight_visual.repeat(repeats)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self.keepsight_visual.truncate(int(self.get_seq_length()))  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return _revived, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _following(cls: type) -> type:
    return type(cls.__name__, (_Following, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _revived(cls: type) -> Any:
    return object.__new__(_following(cls))


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
    mine, theirs = VisualCache.of(cache), VisualCache.of(donor)
    for name, memory in (("cache", mine), ("donor", theirs)):
        if memory is None or memory.valid is None or memory.slots is None:
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
