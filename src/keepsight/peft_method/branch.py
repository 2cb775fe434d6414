"""What hangs beside a module and holds its memories, and the switch that turns all memories off in one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from keepsight.threads import PerThread


@dataclass
class _Switch:
    """What is switched off in one thread."""

    off: tuple[Any, ...] = ()


_switches = PerThread(_Switch)


@contextlib.contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Switch every memory of `model` off, for the length of the block and in the current thread, and nothing else.

    `PeftModel.disable_adapter()` switches off whatever method came first on the model, a LoRA perhaps, touches which
    parameters train, and does so for every thread; this does neither.

    Example:
        >>> with memory_off(model):
        ...     base = model.generate(**inputs)
    """
    switch = _switches.here
    before = switch.off
    switch.off = (*before, *(module for module in model.modules() if isinstance(module, MemoryBranch)))
    try:
        yield
    finally:
        switch.off = before


class MemoryBranch(BaseTunerLayer):
    """What hangs beside a module of the model and holds the memory of every adapter.

    A memory is off for one of two reasons, both of which are looked at here and nowhere else: PEFT's own
    `disable_adapter`, for everybody, or `memory_off`, for one thread.
    """

    @property
    def beside(self) -> Any:
        """A module of the base, whose device and dtype new memories get."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """What PEFT takes device and dtype of new adapters from."""
        return self.beside.weight

    @property
    def place(self) -> torch.device:
        """Where a memory belongs: where its module computes, also where accelerate keeps the module's weight elsewhere
        (on the CPU, on disk) and brings it for each call. A memory is small, and stays."""
        if not self.weight.is_meta:
            return self.weight.device
        return torch.device(getattr(getattr(self.beside, "_hf_hook", None), "execution_device", None) or "meta")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or self.place)

    @property
    def is_off(self) -> bool:
        """Whether no adapter of this branch may act in the current thread."""
        return self.disable_adapters or self in _switches.here.off

    # PEFT calls these on every adapter layer of a model when the adapters of another method are merged.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of a memory is ever merged."""

    def unmerge(self) -> None:
        """Nothing was merged."""
