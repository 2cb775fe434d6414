"""PVM as equations: plain modules of tensors in, tensors out. No transformers, no PEFT, no serving engine.

One block, in parallel with the feed-forward network of a decoder layer (paper, section 4; D model width, W latent
width, x the residual stream after self-attention, V the visual embeddings as they enter the decoder):

    x_lat = x W_txt                    V_lat = V W_vis
    a     = CrossAttention(q = RMSNorm(x_lat), k = V_lat, v = V_lat)       softmax over V alone
    h     = a + SwiGLU(RMSNorm(a))
    out   = RMSNorm_noaffine(h W_up)
    y     = x + FFN(norm(x)) + gate * out                                  at text positions

Because the softmax runs over V alone, the branch's output for a given x does not depend on how much text came before
(the paper's Theorem 4.1).

Where we deviate: the paper's code starts gate *and* W_up at zero, which leaves every gradient at exactly zero; here
only the gate starts at zero. Matrices start with standard deviation fan_in ** -0.5 instead of 0.02.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

#: (query [B, H, T, d], key [B, H_kv, M, d], value [B, H_kv, M, d], mask [B, 1, T or 1, M] or None) -> [B, H, T, d]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """All sizes of a block, resolved from a backbone.

    Attributes:
        hidden_size: D, the backbone's width.
        width: W, the latent width.
        head_dim: d, width of one head; W must be a multiple of it.
        num_kv_heads: key/value heads (grouped-query attention); must divide W / d.
        ffn_width: inner width of the SwiGLU.
        bias: whether the four attention projections have biases.
        eps: of every RMSNorm.
    """

    hidden_size: int
    width: int
    head_dim: int
    num_kv_heads: int
    ffn_width: int
    bias: bool = False
    eps: float = 1e-6

    @property
    def num_heads(self) -> int:
        """Query heads, W / d."""
        return self.width // self.head_dim


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Grouped-query attention by `scaled_dot_product_attention`, scale head_dim ** -0.5, not causal."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1])


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose weight takes the dtype of its input, as a linear map's does under autocast.

    torch has one kernel for it where both agree, and half a dozen where they do not; and a block that is trained under
    autocast computes what it will compute when it is loaded in half precision.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., d] -> [..., d], in x's dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class CrossAttention(nn.Module):
    """Cross-attention from text to visual embeddings, with per-head RMSNorm on q and k and no rotary embedding."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        self.head_dim = shape.head_dim
        kv_width = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.width, bias=shape.bias)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=shape.bias)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=shape.bias)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=shape.bias)
        self.q_norm = RMSNorm(shape.head_dim, eps=shape.eps)
        self.k_norm = RMSNorm(shape.head_dim, eps=shape.eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [B, T, H, d]

    def keys_values(self, v_lat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project latent visual embeddings [B, M, W] to keys and values, each [B, H_kv, M, d]."""
        key = self.k_norm(self._heads(self.k_proj(v_lat))).transpose(1, 2)
        return key, self._heads(self.v_proj(v_lat)).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, attention: Attention
    ) -> torch.Tensor:
        """Attend from latent text states [B, T, W] to keys and values [B, H_kv, M, d]; returns [B, T, W]."""
        query = self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2)
        out = attention(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward network of the block: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, W] -> [B, T, W]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _init_linear(block: nn.Module) -> None:
    """Draw every matrix with standard deviation fan_in ** -0.5.

    It keeps the branch's scale at any width. At a width of 2560 it is the usual 0.02 for the maps down to the latent
    width, and 0.044 for most of those within and out of it (docs/pvm.md). Never zero, W_up least of all: with gate = 0
    and W_up = 0 no parameter would ever get a gradient.
    """
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PvmBlock(nn.Module):
    """One persistent-visual-memory block (paper, section 4).

    Args:
        shape: the sizes.
        init_gate: start value of lambda; 0 leaves the model unchanged, bit for bit.
        detach_visual: no gradient flows into the vision encoder and projector through the memory.
    """

    reads_memory = True
    causal = True  # whether a position sees only the images before it; the caller builds the mask

    def __init__(self, shape: BlockShape, init_gate: float = 0.0, detach_visual: bool = True):
        super().__init__()
        self.shape, self.detach_visual = shape, detach_visual
        self.text_reducer = nn.Linear(shape.hidden_size, shape.width, bias=False)  # W_txt
        self.vision_reducer = nn.Linear(shape.hidden_size, shape.width, bias=False)  # W_vis
        self.output_expander = nn.Linear(shape.width, shape.hidden_size, bias=False)  # W_up
        self.input_norm = RMSNorm(shape.width, eps=shape.eps)
        self.post_attn_norm = RMSNorm(shape.width, eps=shape.eps)
        self.cross_attn = CrossAttention(shape)
        self.mlp = SwiGLU(shape.width, shape.ffn_width)
        self.gate = nn.Parameter(torch.full((1,), float(init_gate)))  # lambda
        _init_linear(self)

    def project(self, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project visual embeddings [B, M, D] to this block's keys and values, each [B, H_kv, M, d].

        Done once per image; the result is all that decoding needs. Cast to the block's dtype and device.
        """
        if self.detach_visual:
            visual = visual.detach()
        weight = self.vision_reducer.weight
        return self.cross_attn.keys_values(self.vision_reducer(visual.to(weight.device, weight.dtype)))

    def forward(
        self,
        x: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        attention: Attention = sdpa,
    ) -> torch.Tensor:
        """The update gate * out for the residual stream.

        Args:
            x: residual stream after self-attention [B, T, D]; cast to the block's dtype.
            key: keys [B, H_kv, M, d] from `project`.
            value: values [B, H_kv, M, d] from `project`.
            mask: bool, true where a query may look, [B, 1, T or 1, M]; a query must see at least one key.
            attention: the attention kernel.

        Returns:
            [B, T, D] in the block's dtype, for every position: silencing visual positions is the caller's part.
        """
        h = self.input_norm(self.text_reducer(x.to(self.text_reducer.weight.dtype)))
        h = self.cross_attn(h, key, value, mask, attention)
        h = h + self.mlp(self.post_attn_norm(h))
        out = self.output_expander(h)
        return self.gate.to(out.dtype) * F.rms_norm(out, out.shape[-1:], eps=self.shape.eps)


class ParallelMlpBlock(nn.Module):
    """The iso-parameter control of the paper: the same bottleneck, gate and output norm, but no memory to look at.

    Its SwiGLU is widened until the block has as many parameters as a `PvmBlock` of the same shape, to within half a
    row of the SwiGLU (3 W / 2 parameters).
    """

    reads_memory = False

    def __init__(self, shape: BlockShape, init_gate: float = 0.0):
        super().__init__()
        self.shape = shape
        with torch.device("meta"):
            target = sum(p.numel() for p in PvmBlock(shape).parameters())
        fixed = 2 * shape.hidden_size * shape.width + 2 * shape.width + 1
        self.text_reducer = nn.Linear(shape.hidden_size, shape.width, bias=False)
        self.output_expander = nn.Linear(shape.width, shape.hidden_size, bias=False)
        self.input_norm = RMSNorm(shape.width, eps=shape.eps)
        self.mlp_norm = RMSNorm(shape.width, eps=shape.eps)
        self.mlp = SwiGLU(shape.width, round((target - fixed) / (3 * shape.width)))
        self.gate = nn.Parameter(torch.full((1,), float(init_gate)))
        _init_linear(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The update [B, T, D] for the residual stream x [B, T, D], in the block's dtype."""
        h = self.input_norm(self.text_reducer(x.to(self.text_reducer.weight.dtype)))
        h = h + self.mlp(self.mlp_norm(h))
        out = self.output_expander(h)
        return self.gate.to(out.dtype) * F.rms_norm(out, out.shape[-1:], eps=self.shape.eps)
