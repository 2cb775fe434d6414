"""Packed rows of several samples: which position belongs to which, and whether the base keeps them apart.

Padding-free training puts the samples of a batch one behind the other into one row. The decoder tells them apart by
their positions, which start again with every sample: transformers' masks do so if they are given nothing else (no
attention mask, no cache), flash attention by `cu_seq_lens_q`. A memory follows the decoder: each sample retrieves from
its own images. Where the decoder itself would mix the samples, they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.errors import KeepsightError


@dataclass(frozen=True)
class Packing:
    """The samples of a call's rows.

    Attributes:
        samples: long [B, T], the number of the sample, from 0, in its row.
        mixed: why the decoder does not keep them apart; None if it does.
    """

    samples: torch.Tensor
    mixed: str | None = None

    def require_apart(self) -> None:
        """Raises KeepsightError if the decoder would mix the samples."""
        if self.mixed is not None:
            raise KeepsightError(
                f"Several samples are packed into one row, and {self.mixed}, so that each would see the "
                "others' text and images. Train with one sample per row (packing=False, padding_free=False), or give "
                "position_ids [B, T] that start again with each sample ([4, B, T] where images lie in three "
                "dimensions: these first, then the VLM's get_rope_index), no attention_mask, and use_cache=False."
            )


def find_packing(
    arguments: Mapping[str, Any], like: torch.Tensor, text_config: Any, has_cache: bool, given: Any = None
) -> Packing | None:
    """The samples in the rows of one decoder call; nothing waits for the device.

    Args:
        arguments: keyword arguments of the decoder.
        like: [B, T, D], what enters it.
        text_config: the decoder's configuration.
        has_cache: whether the call fills a KV cache.
        given: the VLM's own attention mask, of which some make the decoder's before it is called.

    Returns:
        None where nothing can be packed: no positions are given.
    """
    batch, length = like.shape[:2]
    flash = _is_flash(text_config)
    ends = next((arguments[n] for n in _LENGTHS if arguments.get(n) is not None), None)
    if flash and batch == 1 and _has_lengths(arguments):
        ends = arguments["cu_seq_lens_q"]
        at = torch.arange(length, device=ends.device, dtype=ends.dtype)
        samples = torch.searchsorted(ends[1:].contiguous(), at, right=True)[None]
        return Packing(samples.to(like.device), _hybrid(text_config))
    positions = arguments.get("position_ids")
    placed = positions is not None and positions.ndim == 3 and positions.shape[0] == 3  # no positions of the text
    if positions is None or placed:
        if ends is not None or arguments.get("seq_idx") is not None:
            return Packing(torch.ones(batch, length, dtype=torch.long, device=like.device), _NO_POSITIONS)
        if positions is None:
            return None
    mask = given if isinstance(given, torch.Tensor) and given.ndim == 2 else arguments.get("attention_mask")
    ready_made = mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2)
    row = (positions[0] if positions.ndim == 3 else positions).to(like.device)
    step = row.diff(dim=-1, prepend=row[:, :1] - 1)
    if mask is None and not has_cache and not placed:
        begins = row == row.min() if flash else step != 1  # transformers' own rules
    else:  # three-dimensional ones go back behind a video too, but only a sample's first is zero throughout
        begins = _from_zero(positions.to(like.device)) if placed else step < 1
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:  # padding has positions of no meaning
            real = mask[:, -length:].to(like.device).bool()
            begins = begins & real & real.roll(1, -1)
    begins = begins.clone()
    begins[:, 0] = False
    samples = begins.expand(batch, -1).cumsum(-1)
    if ready_made:
        return Packing(samples)  # a finished mask says who sees whom
    mixed = _hybrid(text_config)
    if mixed is None and placed:
        mixed = "the decoder tells samples apart by text positions, of which three-dimensional ones have none"
    elif mixed is None and mask is not None:
        mixed = "transformers looks at positions only where no attention_mask is given"
    elif mixed is None and has_cache:
        mixed = "transformers looks at positions only where no KV cache is filled"
    elif mixed is None and flash and batch > 1:
        mixed = "flash attention looks at positions only where the batch is a single row"
    return Packing(samples, mixed)


def require_kept_apart(samples: torch.Tensor, arguments: Mapping[str, Any], text_config: Any, start: int = 0) -> None:
    """Look at what the attention of one layer is really given: what a decoder makes of positions is its own affair.

    Args:
        samples: [B, T], as in `Packing`.
        arguments: keyword arguments of the layer's attention.
        text_config: the decoder's configuration.
        start: slot of the first position.

    Raises:
        KeepsightError: if a position may attend to another sample.
    """
    mask, batch, length = arguments.get("attention_mask"), *samples.shape
    if mask is None:
        told = arguments.get("position_ids") is not None or _has_lengths(arguments)
        if not (told and _is_flash(text_config)):
            Packing(samples, _NO_MASK).require_apart()
        return
    if hasattr(mask, "mask_mod"):  # of flex attention
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, batch, 1, length, start + length, device=str(samples.device))
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return
    mask = mask[..., start : start + length].to(samples.device)
    is_open = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    same = samples[:, :, None] == samples[:, None, :]
    is_padding = same.sum(-1, keepdim=True) == 1  # its positions do not count on; whom it sees does not matter
    if bool((is_open & ~(same | is_padding)[:, None]).any()):
        Packing(samples, _OPEN_MASK).require_apart()


def _has_lengths(arguments: Mapping[str, Any]) -> bool:
    """Whether flash attention is told the samples' lengths: it looks at none of these arguments unless it has all."""
    return all(arguments.get(name) is not None for name in _LENGTHS)


def _is_flash(text_config: Any) -> bool:
    return "flash" in (getattr(text_config, "_attn_implementation", None) or "")


def _from_zero(places: torch.Tensor) -> torch.Tensor:
    """Where three-dimensional positions [3, B, T] are zero throughout, and do not only pass zero [B, T].

    Behind images positions lag; Qwen's models keep by how much, and count text that comes without pixels from there,
    which may be below zero.
    """
    return (places == 0).all(0) & (places.roll(1, -1) != -1).any(0)


_NO_MASK = "this decoder gives its attention no mask for such positions"
_OPEN_MASK = "the mask of this decoder's attention lets them see each other"
_NO_POSITIONS = "cu_seq_lens or seq_idx alone do not keep them apart in this decoder's attention"
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _hybrid(text_config: Any) -> str | None:
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if "linear_attention" in kinds:
        return "this decoder's linear attention carries its state from one sample into the next"
    if any("attention" not in kind for kind in kinds):  # LFM2's convolutions
        return "this decoder's layers without attention carry their state from one sample into the next"
    return None
