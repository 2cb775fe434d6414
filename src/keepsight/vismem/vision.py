"""The vision encoder with positions of our own in it.

The short-term former puts K queries and M_init into the sequence of patches that the vision encoder sees. This file
walks the encoder's own blocks, with the base's own weights, and gives the appended positions their place in the
attention:

- in blocks that see a whole image, the appended positions attend to all patches of their row and to each other;
- in blocks that attend inside windows (Qwen2.5-VL), the appended positions are a window of their own;
- patches attend to their own image or window, as always, and in whole-image blocks to the appended positions too.

The walk touches no module and no hook of the base, and PEFT layers are called without their adapters, so nothing is
switched on or off anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from keepsight.backbone import Backbone
from keepsight.vismem.module import LowRankBank
from keepsight.vismem.scope import base_only

#: Rotary embeddings of S positions: cosines and sines, each [S, head width].
Rotary = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Patches:
    """The patches of some images as they enter the first block of the vision encoder.

    Attributes:
        x: [S, d].
        images: number of positions of each image (or tile, or frame), in order.
        windows: number of positions of each window; equal to `images` where there are no windows.
        rotary: rotary embeddings, where the encoder has them.
        extent: rows and columns of the largest image, in patches.
    """

    x: torch.Tensor
    images: tuple[int, ...]
    windows: tuple[int, ...]
    rotary: Rotary | None
    extent: tuple[int, int]

    @staticmethod
    def cat(parts: Sequence[Patches]) -> Patches:
        """Images of one row that came in several calls."""
        rotary = None
        if parts[0].rotary is not None:
            rotary = tuple(torch.cat([p.rotary[i] for p in parts if p.rotary is not None]) for i in (0, 1))
        return Patches(
            torch.cat([p.x for p in parts]),
            sum((p.images for p in parts), ()),
            sum((p.windows for p in parts), ()),
            rotary,  # type: ignore[arg-type]
            (max(p.extent[0] for p in parts), max(p.extent[1] for p in parts)),
        )

    def detach(self) -> Patches:
        """Without gradients: the base is frozen while memory is trained."""
        return replace(self, x=self.x.detach())


class VisionWalk:
    """Runs a vision encoder's blocks.

    Args:
        backbone: the model's parts.
        bank: the short-term former's low-rank updates.
    """

    def __init__(self, backbone: Backbone, bank: LowRankBank | None):
        self.backbone, self.bank = backbone, bank
        self.parts = backbone.vision
        self.blocks = list(backbone.vision_blocks)
        self.windowed = backbone.windowed_vision_blocks
        self.read = backbone.vision_layers_read()
        self.depth = max(self.read)

    def through(self, patches: Patches, extra: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """Patches and appended positions see each other.

        Args:
            patches: of one row.
            extra: the appended positions [E, d].
            rotary: their rotary embeddings.

        Returns:
            States of the appended positions where the projector reads them [E, d * layers read].
        """
        x, read = patches.x, []
        for index in range(self.depth):
            x, extra = self._checkpointed(self._block, index, x, extra, patches, rotary)
            read.append((index + 1, extra))
        return self._collect(read)

    def states(self, patches: Patches) -> torch.Tensor:
        """States of patches alone where the projector reads them [S, d * layers read], as the encoder makes them."""
        x, read = patches.x, []
        for index in range(self.depth):
            query, key, value = self._qkv(index, x, patches.rotary)
            seen = attend_inside(query, key, value, patches.windows if index in self.windowed else patches.images)
            x = self._finish(index, x, seen)
            read.append((index + 1, x))
        return self._collect(read)

    def _checkpointed(self, function: Any, *args: Any) -> Any:
        tower = self.blocks[0]
        if torch.is_grad_enabled() and tower.training and getattr(tower, "gradient_checkpointing", False):
            return checkpoint(_under_base_only, function, *args, use_reentrant=False)
        return function(*args)

    def _block(
        self, index: int, x: torch.Tensor, extra: torch.Tensor, patches: Patches, rotary: Rotary | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = self._qkv(index, x, patches.rotary)
        own_query, own_key, own_value = self._qkv(index, extra, rotary)
        if index in self.windowed:
            seen = attend_inside(query, key, value, patches.windows)
            own = attend(own_query, own_key, own_value)
        else:
            seen = attend_inside(query, key, value, patches.images, own_key, own_value)
            own = self._look(index, own_query, torch.cat([key, own_key]), torch.cat([value, own_value]))
        return self._finish(index, x, seen), self._finish(index, extra, own)

    def _look(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The appended positions [E, H, d] look at all patches and at each other [S + E, H, d], in one block."""
        return attend(query, key, value)

    def _qkv(self, index: int, x: torch.Tensor, rotary: Rotary | None) -> tuple[torch.Tensor, ...]:
        block = self.blocks[index]
        attention = getattr(block, self.parts.attention)
        x = getattr(block, self.parts.norms[0])(x)
        projected = [bare(getattr(attention, name))(x) for name in self.parts.qkv]
        if len(projected) == 1:
            projected = list(projected[0].chunk(3, -1))
        projected = [self._updated(index, f"{n}_proj", x, y) for n, y in zip("qkv", projected, strict=True)]
        for i, name in enumerate(self.parts.qk_norms):
            projected[i] = getattr(attention, name)(projected[i])
        heads = [t.unflatten(-1, (attention.num_heads, -1)) for t in projected]
        for i, name in enumerate(self.parts.head_norms):
            heads[i] = getattr(attention, name)(heads[i])
        query, key, value = heads
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        return query, key, value

    def _finish(self, index: int, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        block, parts = self.blocks[index], self.parts
        output = bare(getattr(getattr(block, parts.attention), parts.output))
        first, second = (getattr(block, name) for name in parts.scales) if parts.scales else (1.0, 1.0)
        seen = seen.flatten(-2)
        x = x + first * self._updated(index, "o_proj", seen, output(seen))
        return x + second * getattr(block, parts.mlp)(getattr(block, parts.norms[1])(x))

    def _updated(self, index: int, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        update = self.bank.get(index, name) if self.bank is not None else None
        return y if update is None else y + update(x).to(y.dtype)

    def _collect(self, read: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
        states = dict(read)
        last = len(self.blocks)
        return torch.cat([self._normed(states[i]) if i == last else states[i] for i in self.read], -1)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.parts.final_norm
        return x if norm is None else self.backbone.vision_tower.get_submodule(norm)(x)


def _under_base_only(function: Any, *args: Any) -> Any:
    with base_only():  # the backward pass recomputes this outside the formation
        return function(*args)


def bare(module: Any) -> Any:
    """A layer without the PEFT adapters around it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [S, H, d] by angles given as cosines and sines [S, d], in float32 or wider."""
    wide, half = x if x.dtype == torch.float64 else x.float(), x.shape[-1] // 2
    turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos[:, None].to(wide) + turned * sin[:, None].to(wide)).to(x.dtype)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Everyone to everyone: [S, H, d] to [L, H, d]; returns [S, H, d]."""
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value)
    return out[0].transpose(0, 1)


def attend_inside(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    own_key: torch.Tensor | None = None,
    own_value: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention inside consecutive segments [S, H, d], all of them also seeing `own_key`, `own_value` [E, H, d].

    Segments of one length go through one kernel call.
    """
    starts: dict[int, list[int]] = {}
    if len(set(lengths)) == 1:
        q, k, v = (t.unflatten(0, (len(lengths), -1)).transpose(1, 2) for t in (query, key, value))
        return _seen(q, k, v, own_key, own_value).flatten(0, 1)
    start = 0
    for length in lengths:
        starts.setdefault(length, []).append(start)
        start += length
    out = torch.empty_like(query)
    for length, firsts in starts.items():
        index = torch.tensor(firsts, device=query.device)[:, None] + torch.arange(length, device=query.device)
        q, k, v = (t[index].transpose(1, 2) for t in (query, key, value))  # [n, H, length, d]
        out = out.index_put((index,), _seen(q, k, v, own_key, own_value))
    return out


def _seen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, own_key: torch.Tensor | None, own_value: torch.Tensor | None
) -> torch.Tensor:
    """Attention of n segments [n, H, length, d]; returns [n, length, H, d]."""
    if own_key is not None and own_value is not None:
        k = torch.cat([k, own_key.transpose(0, 1).expand(len(k), -1, -1, -1)], 2)
        v = torch.cat([v, own_value.transpose(0, 1).expand(len(v), -1, -1, -1)], 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
