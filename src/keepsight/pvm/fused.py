"""PVM's branch in six kernels where the plain block takes nineteen. Opt-in until a GPU has timed it.

    with fused():                   # and overlap() of streams.py, if wanted
        model.generate(...)         # or capture a decoding step in a CUDA graph

In a decoding step a block's matrices are read in a few microseconds, and each of its kernels takes two or three more to
start. `fused_kernels.py` has the kernels; the numbers agree with the plain block's within the rounding of its dtype,
of which these have less.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from keepsight.errors import KeepsightError
from keepsight.pvm.module import CrossAttention, PvmBlock, RMSNorm, SwiGLU
from keepsight.threads import PerThread, Switch

MOST_POSITIONS = 16
"""In all rows: beyond, reading the weights once for each position costs more than starting a kernel."""
MOST_UNITS = 8192
"""Inner width of the SwiGLU, of which a program holds a share of a 32nd."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OURS = (PvmBlock, CrossAttention, SwiGLU, RMSNorm, nn.Linear)


_scope: PerThread[Switch] = PerThread(Switch)


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """Let PVM's blocks run as few kernels in decoding steps, in this thread.

    For inference on CUDA, at most 16 positions in a call, blocks in float32, float16 or bfloat16 as they were made.
    All else takes the plain block: prompts, training, autocast, graphs of torch.compile (which fuses by itself), a
    block with hooks of its own (the meters of `keepsight diagnose`), and vLLM, whose cache is another.

    Raises:
        KeepsightError: without Triton.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise KeepsightError(
            "Fused kernels are written in Triton, which is not installed here. It comes with torch on Linux with "
            "CUDA; elsewhere leave `fused()` out."
        ) from error
    before, _scope.here.on = _scope.here.on, True
    try:
        yield
    finally:
        _scope.here.on = before


def may_fuse(block: Any, x: torch.Tensor, states: tuple[torch.Tensor, ...]) -> bool:
    """Whether this block's update for x [B, T, D] is to be made by few kernels."""
    if not _scope.here.on or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    if not (x.is_cuda or _interpreted()) or torch.is_autocast_enabled(x.device.type):
        return False
    if type(block) is not PvmBlock or x.ndim != 3 or x.shape[0] * x.shape[1] > MOST_POSITIONS:
        return False
    if block.shape.ffn_width > MOST_UNITS or any(state.stride(-1) != 1 for state in states):
        return False
    modules, parameters, dtype = list(block.modules()), list(block.parameters()), block.gate.dtype
    return (
        dtype in DTYPES
        and all(type(m) in _OURS and not m._forward_hooks and not m._forward_pre_hooks for m in modules)
        and all(parameter.is_contiguous() for parameter in parameters)
        and all(tensor.dtype == dtype and tensor.device == x.device for tensor in (*parameters, *states))
    )


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, as it does on a CPU with TRITON_INTERPRET=1: for tests."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class Fused:
    """The update of one block, made by five kernels; the sixth scales and adds it.

    Args:
        block: a block that `may_fuse` here.
        x: residual stream [B, T, D].
        states: keys and values [B, H_kv, M, d].
        mask: bool [B, 1, T or 1, M], where a position may look; None if everywhere.
        keep: bool [B, T or 1, 1], where the branch may speak; None if everywhere.
    """

    def __init__(
        self,
        block: PvmBlock,
        x: torch.Tensor,
        states: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None,
        keep: torch.Tensor | None,
    ):
        from triton import cdiv
        from triton import next_power_of_2 as power

        from keepsight.pvm import fused_kernels as kernels

        self._block, self._queries, (key, value) = block, x.shape[1], states
        self._keep = None if keep is None else keep.to(x.device).expand(x.shape[0], x.shape[1], 1)
        shape, n, tokens = block.shape, x.shape[0] * x.shape[1], key.shape[2]
        hidden, width, heads, d = shape.hidden_size, shape.width, shape.num_heads, shape.head_dim
        attention, mlp = block.cross_attn, block.mlp
        sizes: dict[str, Any] = {"W": width, "EPS": shape.eps}
        step, head = min(power(width), 512), max(power(d), 16)

        def new(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=x.device)

        with _on(x.device):
            share = min(power(hidden), 1024)
            count = cdiv(hidden, share)
            parts = new(count, n, width)
            kernels.reduce[(cdiv(width, 16), count, n)](
                x.contiguous(), block.text_reducer.weight, parts, n, hidden, width, share, 16, min(share, 512)
            )

            splits = min(cdiv(tokens, 64), 32)
            shares, stats = new(n, heads, splits, d), new(n, heads, splits, 2)
            if mask is not None:
                mask = mask.to(x.device).expand(x.shape[0], 1, x.shape[1], tokens)
                mask = mask if mask.stride(3) == 1 else mask.contiguous()
            kernels.attend[(heads, splits, n)](
                parts, block.input_norm.weight, attention.q_proj.weight, attention.q_proj.bias, attention.q_norm.weight,
                key, value, mask, shares, stats, n, tokens, cdiv(tokens, splits), self._queries,
                *key.stride()[:3], *value.stride()[:3], *((0, 0) if mask is None else (mask.stride(0), mask.stride(2))),
                **sizes, D_HEAD=d, HEAD=head, GROUP=heads // shape.num_kv_heads, STEP=min(step, 128), TOKENS=32,
                COUNT=count, PADDED=power(count), num_warps=max(4, head // 32),
            )  # fmt: skip

            units = max(16, power(cdiv(shape.ffn_width, 32)))
            count = cdiv(shape.ffn_width, units)
            parts = new(count + 1, n, width)  # those of the SwiGLU, and a
            kernels.project[(cdiv(width, 16), n)](
                shares, stats, attention.o_proj.weight, attention.o_proj.bias, parts[count], width, d, head,
                splits, power(splits), 16,
            )  # fmt: skip
            kernels.feed[(count, n)](
                parts[count], block.post_attn_norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight,
                mlp.down_proj.weight, parts, n, F=shape.ffn_width, UNITS=units, STEP=min(step, 128), **sizes,
                num_warps=max(4, units // 16),
            )  # fmt: skip

            programs = cdiv(hidden, 32)
            self._out, self._squares = new(n, hidden), new(n, programs)
            kernels.expand[(programs, n)](
                parts, block.output_expander.weight, self._out, self._squares, n, hidden, width,
                count + 1, power(count + 1), 32, min(step, 128),
            )  # fmt: skip

    def added_to(self, y: torch.Tensor) -> torch.Tensor:
        """y [B, T, D] or [B * T, D] plus the update, in y's dtype."""
        from triton import cdiv
        from triton import next_power_of_2 as power

        from keepsight.pvm import fused_kernels as kernels

        y, keep, programs = y.contiguous(), self._keep, self._squares.shape[1]
        n, hidden = self._out.shape
        total = torch.empty_like(y)
        with _on(y.device):
            kernels.finish[(cdiv(hidden, 1024), n)](
                self._out, self._squares, self._block.gate, keep, y, total, self._queries,
                *((0, 0) if keep is None else keep.stride()[:2]),
                D=hidden, EPS=self._block.shape.eps, COUNT=programs, PADDED=power(programs), COLUMNS=1024,
            )  # fmt: skip
        return total


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton starts kernels on the current device, which is not always where the layer is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
