"""The fork of `streams.py` in graphs that torch.compile makes: two operators that a compiler does not look into.

    update = begin(x, block...)           the block runs on the second stream
    ...                                   the feed-forward network
    y = join(y, [update], what it read)   waits for it, and adds

A compiler moves an operator to wherever its inputs allow: `begin` down to `join`, where nothing would be left to run
beside. So `begin` says that it writes x, which it does not: whatever reads x afterwards, the network first, stays
behind it. And `join` is given what `begin` read, so that none of that memory is handed out while the stream reads it.

An operator is given tensors and numbers, and no module: its weights are lent to a weightless block of the same shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from keepsight.pvm.module import BlockShape, ParallelMlpBlock, PvmBlock
from keepsight.pvm.streams import beside, wait
from keepsight.pvm.work import Work, added
from keepsight.threads import PerThread

_weightless: PerThread[dict[tuple, nn.Module]] = PerThread(dict)  # by thread: a call lends them weights


class CompiledFork:
    """`streams.Fork` as a compiler can follow it.

    Args:
        x: the residual stream [B, T, D].
        works: what to start.
    """

    def __init__(self, x: torch.Tensor, works: Sequence[Work]):
        self._held = [x, *(t for work in works for t in (*work.states, work.mask, work.keep) if t is not None)]
        self._updates = [_started(x, work) for work in works]

    def join(self, y: torch.Tensor) -> torch.Tensor:
        """What leaves the network, [B, T, D] or [B * T, D], and the updates; the current stream waits for them."""
        return _join(y, self._updates, self._held) if self._updates else y


def _started(x: torch.Tensor, work: Work) -> torch.Tensor:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    shape = work.block.shape
    sizes = [shape.hidden_size, shape.width, shape.head_dim, shape.num_kv_heads, shape.ffn_width, int(shape.bias)]
    weights = [parameter for _, parameter in work.block.named_parameters()]
    attention = getattr(work.text_config, "_attn_implementation", None) or "sdpa"
    return _begin(x, list(work.states), work.mask, work.keep, weights, sizes, shape.eps, attention, autocast)


@torch.library.custom_op(
    "keepsight::pvm_begin",
    mutates_args=("x",),
    schema="(Tensor(a!) x, Tensor[] states, Tensor? mask, Tensor? keep, Tensor[] weights, int[] sizes, float eps, "
    "str attention, ScalarType? autocast) -> Tensor",
)
def _begin(x: torch.Tensor, *work: Any) -> torch.Tensor:
    with beside(x.device):
        return _update(x, *work)


@_begin.register_fake
def _update(
    x: torch.Tensor,
    states: list[torch.Tensor],
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    weights: list[torch.Tensor],
    sizes: list[int],
    eps: float,
    attention: str,
    autocast: torch.dtype | None,
) -> torch.Tensor:
    block = _block(bool(states), tuple(sizes), eps)
    lent = dict(zip((name for name, _ in block.named_parameters()), weights, strict=True))
    kernel = SimpleNamespace(_attn_implementation=attention)
    with torch.autocast(x.device.type, autocast) if autocast is not None else contextlib.nullcontext():
        return Work(_Lent(block, lent), tuple(states), mask, keep, kernel).update(x)


class _Lent:
    """A block called with the weights it was lent."""

    def __init__(self, block: nn.Module, weights: dict[str, torch.Tensor]):
        self._block, self._weights = block, weights

    def __call__(self, *args: object) -> torch.Tensor:
        return functional_call(self._block, self._weights, args, strict=True)


def _block(looks: bool, sizes: tuple[int, ...], eps: float) -> nn.Module:
    """A block without weights, whose equations are the same."""
    key = (looks, sizes, eps)
    if key not in _weightless.here:
        hidden, width, head, kv_heads, ffn, bias = sizes
        shape = BlockShape(
            hidden_size=hidden,
            width=width,
            head_dim=head,
            num_kv_heads=kv_heads,
            ffn_width=ffn,
            bias=bool(bias),
            eps=eps,
        )
        with torch.device("meta"):
            _weightless.here[key] = PvmBlock(shape) if looks else ParallelMlpBlock(shape)
    return _weightless.here[key]


@torch.library.custom_op(
    "keepsight::pvm_join", mutates_args=(), schema="(Tensor y, Tensor[] updates, Tensor[] held) -> Tensor"
)
def _join(y: torch.Tensor, updates: list[torch.Tensor], held: list[torch.Tensor]) -> torch.Tensor:
    wait(y.device)
    return added(y, updates)


@_join.register_fake
def _(y: torch.Tensor, updates: list[torch.Tensor], held: list[torch.Tensor]) -> torch.Tensor:
    return added(y, updates)
