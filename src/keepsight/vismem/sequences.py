"""Rows of different lengths as one tensor, and what becomes of ids, limits and caches as sequences grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import StoppingCriteria

from keepsight.compat import find_output_cache
from keepsight.vismem.tokens import MemoryTokens

#: Read with the prompt, and not again.
PIXELS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes")


def pad(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [L_i, D] as one tensor [B, L, D], padded on the left with zeros, and where it is valid: bool [B, L]."""
    longest = max(len(row) for row in rows)
    stacked = torch.stack([pad_left(row, longest, 0) for row in rows])
    counts = torch.tensor([len(row) for row in rows], device=stacked.device)
    valid = torch.arange(longest, device=stacked.device) >= longest - counts[:, None]
    return stacked, valid


def pad_left(x: torch.Tensor, length: int, dim: int, value: float = 0) -> torch.Tensor:
    """Pad `x` at the start of `dim`, to `length`."""
    missing = length - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (missing, 0), value=value) if missing else x


def pad_right(rows: Sequence[torch.Tensor], value: float = 0) -> torch.Tensor:
    """Rows [T_i, ...] as one tensor [n, T, ...], padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(r, (0, 0) * (r.ndim - 1) + (0, longest - len(r)), value=value) for r in rows])


def text_last(ids: torch.Tensor, is_memory: torch.Tensor, filler: int) -> torch.Tensor:
    """Ids [B, T] without their memories: the text in its order, on the right, and `filler` before it.

    Args:
        ids: of whole sequences.
        is_memory: bool [B, T].
        filler: id that stands where there is nothing.
    """
    order = (~is_memory).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order).masked_fill(is_memory.gather(1, order), filler)


class TextOnly(StoppingCriteria):
    """Asks another criterion about the text without its memories.

    Args:
        criterion: the criterion.
        tokens: which ids are memory.
        pad: id to fill up with, on the left.
    """

    def __init__(self, criterion: Any, tokens: MemoryTokens, pad: int):
        self.criterion, self.tokens, self.pad = criterion, tokens, pad

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool [B]."""
        return self.criterion(text_last(input_ids, self.tokens.memory_mask(input_ids), self.pad), scores, **kwargs)


class WordLimit(StoppingCriteria):
    """Stops a row after so many tokens of text, its memories not counted.

    Args:
        tokens: which ids are memory.
        prompt: length of the prompt.
        limit: words after it.
    """

    def __init__(self, tokens: MemoryTokens, prompt: int, limit: int):
        self.tokens, self.prompt, self.limit = tokens, prompt, limit

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Bool [B]."""
        words = ~self.tokens.memory_mask(input_ids[:, self.prompt :])
        return words.sum(1) >= self.limit


def take_rows(index: torch.Tensor, output: Any, arguments: dict[str, Any]) -> None:
    """Make a batch in the middle of `generate` that of the rows in `index`.

    Args:
        index: [B'], rows of the batch as it is; some several times.
        output: of the model's latest call: its logits and its cache are replaced.
        arguments: the model's next keyword arguments, changed in place.
    """
    rows = len(output.logits)
    index = index.to(output.logits.device)
    output.logits = output.logits[index]
    cache = find_output_cache(output)
    assert cache is not None
    cache.reorder_cache(index)
    for name, value in arguments.items():
        if not torch.is_tensor(value):
            continue
        dim = 1 if name == "position_ids" and value.ndim == 3 else 0
        if value.ndim > dim and value.shape[dim] == rows and name not in PIXELS:
            arguments[name] = value.index_select(dim, index.to(value.device))
