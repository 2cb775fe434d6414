"""One PVM block in vLLM: the block of training, with its visual memory in a paged cache of its own.

The block is `keepsight.pvm.module.PvmBlock` itself, weights, equations and all; what differs from the Hugging Face path
is only the attention function it is handed, which reads vLLM's paged cache. So whatever vLLM does with the cache
(batching, chunks, prefix sharing, preemption, rejected drafts), it does with the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from keepsight.pvm.module import BlockShape, PvmBlock
from keepsight.serve.vllm.attention import choose_layout
from keepsight.serve.vllm.check import UnsupportedVllmError


class PagedMemory(nn.Module):
    """The block of one decoder layer. Replicated on every rank of tensor parallelism: it is small.

    Args:
        shape: sizes of the block.
        vllm_config: of the engine being built.
        prefix: the layer's name, with exactly one number in it, as vLLM's cache wants names.
        visual: bool [N, 1], true at visual positions of the step; shared by all blocks and filled by the model.
    """

    def __init__(self, shape: BlockShape, vllm_config: VllmConfig, prefix: str, visual: torch.Tensor):
        super().__init__()
        self.block = PvmBlock(shape)
        backend = _backend_of_the_model(vllm_config)
        widest = 512
        if backend.get_name() == "TRITON_ATTN":  # its scratch memory is as wide as the model's own heads
            widest = 1 << (vllm_config.model_config.get_head_size() - 1).bit_length()
        self.layout = choose_layout(shape.num_heads, shape.num_kv_heads, shape.head_dim, backend, widest)
        twice = 1 if self.layout.size > shape.head_dim else 2
        self.attn = Attention(
            twice * shape.num_heads,
            self.layout.size,
            shape.head_dim**-0.5,
            num_kv_heads=twice * shape.num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
            attn_backend=backend,
        )
        if self.attn.sliding_window is not None:
            raise UnsupportedVllmError(
                "This model runs with a sliding window, in which a visual memory would be forgotten with the image."
            )
        # Fixed addresses, for CUDA graphs. Written by `remember`, outside graphs, before the step reads them.
        rows = (visual.shape[0], twice * shape.num_kv_heads, self.layout.size)
        self.register_buffer("key", torch.empty(rows), persistent=False)
        self.register_buffer("value", torch.empty(rows), persistent=False)
        self.register_buffer("visual", visual, persistent=False)
        self.key: torch.Tensor
        self.value: torch.Tensor
        self.visual: torch.Tensor
        self.layout.empty(self.key, self.value)

    def remember(self, embeds: torch.Tensor, where: torch.Tensor | None, count: int) -> None:
        """Set the step's keys and values.

        Args:
            embeds: what enters the decoder [n, D].
            where: long [m], the visual positions among them; None if there are none.
            count: rows to reset: all that this step or the last one uses.
        """
        self.layout.empty(self.key[:count], self.value[:count])
        if where is not None:
            key, value = self.block.project(embeds[where][None])  # [1, H_kv, m, d]
            key, value = self.layout.pack(key[0].transpose(0, 1), value[0].transpose(0, 1))
            self.key.index_copy_(0, where, key)
            self.value.index_copy_(0, where, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update [n, D] for the residual stream x [n, D]: 0 at visual positions and before the first image."""
        count = x.shape[0]
        seen: list[torch.Tensor] = []

        def paged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any) -> torch.Tensor:
            packed = self.layout.pack_query(query[0].transpose(0, 1)).contiguous()
            out = self.attn(packed.flatten(1), key.flatten(1), value.flatten(1)).view(packed.shape)
            out, some = self.layout.unpack(out)
            seen.append(some)
            return out.transpose(0, 1)[None]

        update = self.block(x[None], self.key[:count], self.value[:count], None, paged)[0]
        return update.masked_fill(~seen[0] | self.visual[:count], 0)


def _backend_of_the_model(vllm_config: VllmConfig) -> Any:
    """The attention backend that the model's own decoder layers chose."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    backends = [layer.attn_backend for layer in layers if isinstance(layer, Attention)]
    if not backends:
        raise UnsupportedVllmError("No decoder layer of this model uses vLLM's Attention, whose cache a memory shares.")
    return backends[0]
