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
from collections.abc import Iterator, Sequence

import torch

from keepsight.pvm.work import Work, added
from keepsight.threads import PerThread, Switch

MOST_POSITIONS = 8
"""Per row: beyond, the branch has work enough to slow the network down."""


_scope: PerThread[Switch] = PerThread(Switch)
_streams: PerThread[dict[torch.device, torch.cuda.Stream]] = PerThread(dict)  # shared by threads, memory would be too


@contextlib.contextmanager
def overlap() -> Iterator[None]:
    """Let PVM's branches run beside the feed-forward networks in decoding steps, in this thread.

    The numbers are those of the plain order. In a graph of torch.compile, which is then made anew, the branch is an
    operator that the compiler does not look into. Prompts and training stay as they are; on a CPU the branch is only
    computed a little earlier.
    """
    before, _scope.here.on = _scope.here.on, True
    try:
        yield
    finally:
        _scope.here.on = before


def may_overlap(x: torch.Tensor, brings_images: bool) -> bool:
    """Whether the branch on the residual stream x [B, T, D] of this call may run beside the network."""
    if torch.is_grad_enabled() or not _scope.here.on:
        return False
    return not brings_images and x.ndim == 3 and x.shape[1] <= MOST_POSITIONS


def beside(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Work inside goes to the second stream of a CUDA device, behind all that its current stream has been given."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    if device not in _streams.here:
        _streams.here[device] = torch.cuda.Stream(device)
    _streams.here[device].wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(_streams.here[device])


def wait(device: torch.device) -> None:
    """The current stream of a CUDA device waits for what `beside` was given in this thread."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_streams.here[device])


class Fork:
    """Work that has been started on the second stream of x's device.

    Args:
        x: the residual stream [B, T, D]; what current streams still do to it is waited for.
        works: what to start.
    """

    def __init__(self, x: torch.Tensor, works: Sequence[Work]):
        self._device, self._works = x.device, works  # what they read is kept until the join
        with beside(x.device):
            self._updates = [work.start(x) for work in works]

    def join(self, y: torch.Tensor) -> torch.Tensor:
        """What leaves the network, [B, T, D] or [B * T, D], and the updates; the current stream waits for them."""
        wait(self._device)
        return added(y, self._updates)
