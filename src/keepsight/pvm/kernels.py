"""Choose the attention kernel of a block: SDPA, or the model's own flash attention where the model runs with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keepsight.pvm.module import Attention, sdpa


def attention_for(text_config: Any, mask: torch.Tensor | None) -> Attention:
    """The kernel for one call.

    Args:
        text_config: the decoder's configuration, which names the attention the model runs with.
        mask: the mask of this call. Flash attention takes none of arbitrary shape, so a masked call (rows with
            different numbers of visual tokens, text between images in the prompt) runs with SDPA.
    """
    name = getattr(text_config, "_attn_implementation", None) or "sdpa"
    if mask is not None or "flash_attention" not in name:
        return sdpa
    return _FlashAttention(name, text_config)


class _FlashAttention:
    """A flash attention of transformers' registry, with the calling convention of `sdpa`."""

    def __init__(self, name: str, text_config: Any):
        self.function = ALL_ATTENTION_FUNCTIONS[name]
        # what transformers' attention functions read of the module they are called for
        self.module = SimpleNamespace(config=text_config, is_causal=False, layer_idx=None)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if query.dtype not in (torch.float16, torch.bfloat16):  # flash kernels know half precision only
            return sdpa(query, key, value, mask)
        scaling = query.shape[-1] ** -0.5
        out, _ = self.function(self.module, query, key, value, None, scaling=scaling, is_causal=False)
        return out.transpose(1, 2)  # the registry's convention is [B, T, H, d]
