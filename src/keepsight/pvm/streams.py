"""A branch that runs beside the feed-forward network, on a CUDA stream of its own. Opt-in until a GPU has timed it.

    with overlap():
        model.generate(...)         # or capture a decoding step in a CUDA graph, which keeps the fork

PVM's branch and the feed-forward network both begin at the residual stream and end in one sum. In a decoding step the
network's weights take longer to read than the branch's dozen small kernels to run, so they fit beneath it. The branch
forks where the residual is known and joins where its update is added; its operations are the same, in the same order.

Nothing is told to the allocator (`record_stream`). What the branch makes lies in its stream's own memory, which is
handed out again only behind the next fork, and that waits for the sum that read it; what it reads outlives the join.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from keepsight.threads import PerThread

MOST_POSITIONS = 8
"""Per row: beyond, the branch has work enough to slow the network down."""

Updates = list[torch.Tensor]

_overlap: ContextVar[bool] = ContextVar("keepsight_pvm_overlap", default=False)
_streams: PerThread[dict[torch.device, torch.cuda.Stream]] = PerThread(dict)  # shared by threads, memory would be too


@contextlib.contextmanager
def overlap() -> Iterator[None]:
    """Let PVM's branches run beside the feed-forward networks in decoding steps, in this thread or task.

    The numbers are the same. Graphs that torch.compile makes, prompts and training stay as they are; on a CPU the
    branch is only computed a little earlier.
    """
    token = _overlap.set(True)
    try:
        yield
    finally:
        _overlap.reset(token)


def may_overlap(x: torch.Tensor, brings_images: bool) -> bool:
    """Whether the branch on the residual stream x [B, T, D] of this call may run beside the network."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # torch before 2.12 cannot compile a context variable
        return False
    return _overlap.get() and not brings_images and x.ndim == 3 and x.shape[1] <= MOST_POSITIONS


class Fork:
    """Work that has been started on the second stream of x's device.

    Args:
        x: what it begins with; what current streams still do to it is waited for.
        work: makes the updates [B, T, D].
    """

    def __init__(self, x: torch.Tensor, work: Callable[[], Updates]):
        self._stream: torch.cuda.Stream | None = None
        if not x.is_cuda:
            self._updates = work()
            return
        if x.device not in _streams.here:
            _streams.here[x.device] = torch.cuda.Stream(x.device)
        self._stream = _streams.here[x.device]
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            self._updates = work()

    def join(self) -> Updates:
        """The updates; the current stream waits for them."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return self._updates
