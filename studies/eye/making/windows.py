"""Attention within windows of one length at once, where transformers takes one after the other without FlashAttention.

The tower of Qwen2.5-VL cuts its sequence into windows. With an attention whose name holds "flash" it hands over the
whole with the windows' bounds (`cu_seq_lens_q`); here, every window is a picture or an image, all of one size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

_NAME = "equal_windows_without_flash"


def equal_windows(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cu_seq_lens_q: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention for `AttentionInterface`.

    Args:
        module: ignored.
        query, key, value: `[1, H, T, d]`.
        attention_mask: None.
        cu_seq_lens_q: `[windows + 1]`, bounds of the windows.
        scaling: of the scores.
        kwargs: what other implementations need.

    Returns:
        `[1, T, H, d]`, and None instead of weights.
    """
    lengths = cu_seq_lens_q.diff()
    length = int(lengths[0])
    assert bool((lengths == length).all()), lengths
    _, heads, total, width = query.shape
    query, key, value = (one.view(heads, total // length, length, width).transpose(0, 1) for one in (query, key, value))
    if query.device.type == "cpu":  # here the gradient of SDPA is far slower than that of its parts
        found = (query @ key.transpose(-1, -2) * scaling).softmax(-1) @ value
    else:
        found = F.scaled_dot_product_attention(query, key, value, scale=scaling)
    return found.transpose(1, 2).reshape(1, total, heads, width), None


AttentionInterface.register(_NAME, equal_windows)


def use(tower: Any) -> None:
    """Let a tower of Qwen2.5-VL attend so. `set_attn_implementation` would look for FlashAttention first."""
    tower.config._attn_implementation = _NAME
