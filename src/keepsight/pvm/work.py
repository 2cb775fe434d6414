"""What one block has to do in one call: the block, and what it reads beside the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from keepsight.pvm.fused import Fused, may_fuse
from keepsight.pvm.kernels import attention_for


class Work(NamedTuple):
    """The update of one block.

    Attributes:
        block: a `PvmBlock`, or the control's `ParallelMlpBlock`.
        states: keys and values [B, H_kv, M, d]; none for the control.
        mask: bool [B, 1, T or 1, M], where a position may look; None if everywhere.
        keep: bool [B, T or 1, 1], where the branch may speak; None if everywhere.
        text_config: the decoder's configuration, which names the attention.
    """

    block: Any
    states: tuple[torch.Tensor, ...]
    mask: torch.Tensor | None
    keep: torch.Tensor | None
    text_config: Any

    def start(self, x: torch.Tensor) -> torch.Tensor | Fused:
        """The update for the residual stream x [B, T, D]; by few kernels where that was asked for and fits."""
        if self.states and may_fuse(self.block, x, self.states):
            return Fused(self.block, x, self.states, self.mask, self.keep)
        return self.update(x)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """gate * out [B, T, D] for the residual stream x [B, T, D]."""
        if self.states:
            update = self.block(x, *self.states, self.mask, attention_for(self.text_config, self.mask))
        else:
            update = self.block(x)
        return update if self.keep is None else update.masked_fill(~self.keep.to(update.device), 0)


def added(y: torch.Tensor, updates: Sequence[torch.Tensor | Fused]) -> torch.Tensor:
    """y [B, T, D] or [B * T, D] plus updates [B, T, D], in y's dtype."""
    for update in updates:
        if isinstance(update, Fused):
            y = update.added_to(y)
            continue
        if update.ndim == 3 and y.ndim == 2:  # some mixtures of experts return [B * T, D]
            update = update.flatten(0, 1)
        y = y + update.to(y.dtype)
    return y
