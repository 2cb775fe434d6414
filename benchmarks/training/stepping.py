"""Timing and weighing training steps: what the training benchmarks share."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Bytes of tensors that live at once on a CPU, where torch keeps no account; what was there before is left out.

    Storages are counted once, however many tensors look at them. Memory that an operation takes and gives back inside
    itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Most bytes in use while the block ran: all of the GPU's, or what the block itself made on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    meter = PeakMemory()
    with meter:
        yield lambda: meter.peak


def wait(device: torch.device) -> None:
    """Let a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    steps: Mapping[str, Callable[[], None]], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of every step, all variants in each round, in an order that rotates from round to round.

    By the clock on the wall where a GPU works; on a CPU by this process's own time, which other jobs on the machine do
    not count in.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    names = list(steps)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + repeats):
        turn = round_ % len(names)
        for name in (*names[turn:], *names[:turn]):
            wait(device)
            started = clock()
            steps[name]()
            wait(device)
            if round_ >= warmup:
                samples[name].append(clock() - started)
    return samples
