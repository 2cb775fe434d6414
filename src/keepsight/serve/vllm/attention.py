"""Visual memory as ordinary causal attention over a paged cache, in which only visual positions count.

An engine's attention sees all positions before a query. PVM's sees the visual ones among them. Every position
writes a key and a value to the block's own cache; the two layouts below make those of text weigh nothing, exactly.

Both also say whether a query saw any image at all (`seen`), because the branch must be silent where it did not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

FLAG_QUERY, FLAG_KEY = 64.0, 256.0
"""Exact in bfloat16, float16 and float8-e4m3; their product, scaled, is far below where exp becomes 0."""


@dataclass(frozen=True)
class FlagChannel:
    """One more channel per head says "not visual": a score so low that softmax gives it weight 0.

        visual position   key [k, 0, 0...]      value [v, 1, 0...]
        any other         key [0, -256, 0...]   value 0
        query             [q, 64, 0...]

    Without any visual key before it, a query weighs all keys alike, and their values are 0.

    Attributes:
        heads: H, query heads.
        kv_heads: H_kv, key/value heads.
        head_dim: d, of the block.
        size: width of a head in the cache, at least d + 1.
    """

    heads: int
    kv_heads: int
    head_dim: int
    size: int

    def empty(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write "not visual" to rows [n, H_kv, size] of both buffers."""
        key.zero_()
        key[..., self.head_dim] = -FLAG_KEY
        value.zero_()

    def pack(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, H_kv, d] of visual positions as the cache holds them, [n, H_kv, size]."""
        pad = self.size - self.head_dim
        return F.pad(key, (0, pad)), F.pad(F.pad(value, (0, 1), value=1.0), (0, pad - 1))

    def pack_query(self, query: torch.Tensor) -> torch.Tensor:
        """[n, H, d] -> [n, H, size]."""
        return F.pad(F.pad(query, (0, 1), value=FLAG_QUERY), (0, self.size - self.head_dim - 1))

    def unpack(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention's output [n, H, size] -> (output [n, H, d], seen: bool [n, 1])."""
        return out[..., : self.head_dim], out[:, :1, self.head_dim] > 0.5


@dataclass(frozen=True)
class TwinHeads:
    """For attention kernels that know no head wider than d: a second set of heads counts the visual share.

        visual position   keys [k | k]   values [v | 1]
        any other         keys 0         values 0
        query             [q | q]

    Text takes part in the softmax with score 0; output / share removes its part again. Twice the heads of
    `FlagChannel`, none of the padding.

    Attributes:
        heads: H, query heads of the block (the cache's attention has 2 H).
        kv_heads: H_kv, key/value heads of the block.
        head_dim: d.
    """

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def size(self) -> int:
        """Width of a head in the cache."""
        return self.head_dim

    def empty(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write "not visual" to rows [n, 2 H_kv, d] of both buffers."""
        key.zero_()
        value.zero_()

    def pack(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, H_kv, d] of visual positions as the cache holds them, [n, 2 H_kv, d]."""
        return torch.cat([key, key], 1), torch.cat([value, torch.ones_like(value)], 1)

    def pack_query(self, query: torch.Tensor) -> torch.Tensor:
        """[n, H, d] -> [n, 2 H, d]."""
        return torch.cat([query, query], 1)

    def unpack(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention's output [n, 2 H, d] -> (output [n, H, d], seen: bool [n, 1])."""
        values, share = out[:, : self.heads], out[:, self.heads :]
        seen = share[:, :1, 0] > 0
        return values / torch.where(share > 0, share, 1), seen


Layout = FlagChannel | TwinHeads
_SIZES = (32, 64, 96, 128, 160, 192, 256)


def choose_layout(heads: int, kv_heads: int, head_dim: int, backend: object, widest: int) -> Layout:
    """The layout for a block on vLLM's attention backend.

    Args:
        heads: H of the block.
        kv_heads: H_kv of the block.
        head_dim: d of the block.
        backend: class of the backend that the model's own layers use; asked `supports_head_size(size)`.
        widest: no head may be wider than this.

    Raises:
        ValueError: if neither fits.
    """
    supports = backend.supports_head_size  # type: ignore[attr-defined]
    for size in _SIZES:
        if head_dim < size <= widest and supports(size):
            return FlagChannel(heads, kv_heads, head_dim, size)
    if head_dim <= widest and supports(head_dim):
        return TwinHeads(heads, kv_heads, head_dim)
    raise ValueError(
        f"The memory's heads are {head_dim} wide, and vLLM's attention backend here "
        f"({backend.get_name()}) has no kernel for that width or a wider one. "  # type: ignore[attr-defined]
        "Choose another backend, as with --attention-backend FLASH_ATTN."
    )
