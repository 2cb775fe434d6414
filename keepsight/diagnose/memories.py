"""The one interface through which the causal battery handles a memory, whatever its method. PVM implements it here.

Another method joins by a class with the same members and one line in `memory_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from keepsight.pvm import memory_off, replace_memory, swap_memory
from keepsight.pvm.tuner import PvmBranch

#: (remembered [B, M, D], validity [B, M]) -> what is remembered instead, same shape
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Memory(Protocol):
    """What the battery asks of a memory. All context managers act on the model they were made for, and undo it."""

    method: str
    layers: list[int]

    def off(self) -> AbstractContextManager[Any]:
        """The model as if it had no memory."""
        ...

    def changed(self, change: Change) -> AbstractContextManager[Any]:
        """Other contents: whenever something is remembered, `change` says what instead."""
        ...

    def swap(self, cache: Any, donor: Any) -> None:
        """In the middle of a generation, remember what `donor`'s sequences saw."""
        ...


class PvmHandle:
    """PVM through the interface.

    Args:
        model: a model with at least one active PVM block that reads a memory.
    """

    method = "PVM"

    def __init__(self, model: Any):
        self.model = model
        self.layers = sorted(branch.index for branch in reading_branches(model))

    def off(self) -> AbstractContextManager[Any]:
        """See `Memory.off`."""
        return memory_off(self.model)

    def changed(self, change: Change) -> AbstractContextManager[Any]:
        """See `Memory.changed`."""
        return replace_memory(change)

    def swap(self, cache: Any, donor: Any) -> None:
        """See `Memory.swap`."""
        swap_memory(cache, donor)


def reading_branches(model: Any) -> list[PvmBranch]:
    """The PVM branches that are switched on and look at a memory (the control's parallel MLP does not)."""
    found = [module for module in model.modules() if isinstance(module, PvmBranch)]
    return [branch for branch in found if any(block.reads_memory for _, block in branch.active_blocks)]


def memory_of(model: Any) -> Memory | None:
    """The memory that a model carries, or None."""
    return PvmHandle(model) if reading_branches(model) else None


@contextmanager
def remembered(memory: Memory) -> Any:
    """Collects what the model remembers inside the block: a list of tensors [B, M, D]."""
    seen: list[torch.Tensor] = []

    def note(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        seen.append(embeds.detach().clone())
        return embeds

    with memory.changed(note):
        yield seen


def zeroed(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Nothing in it."""
    return torch.zeros_like(embeds)


def scaled(factor: float) -> Change:
    """The same contents, louder or quieter."""
    return lambda embeds, valid: embeds * factor


def matched_noise(seed: int) -> Change:
    """Gaussian noise with the mean and spread that each dimension has over the visual tokens."""

    def change(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(embeds.shape, generator=generator).to(embeds.device, embeds.dtype)
        weight = valid[..., None].to(embeds.dtype)
        count = weight.sum(1, keepdim=True).clamp(min=1)
        mean = (embeds * weight).sum(1, keepdim=True) / count
        spread = (((embeds - mean) ** 2 * weight).sum(1, keepdim=True) / count).sqrt()
        return mean + noise * spread

    return change


def taken_from(other: torch.Tensor) -> Change:
    """What another image [1, M', D] left, stretched to the same number of visual tokens."""

    def change(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return stretched(other, embeds.shape[1]).to(embeds.device, embeds.dtype).expand_as(embeds)

    return change


def mixed_from(others: list[torch.Tensor], seed: int) -> Change:
    """Every visual token from the same place of some other image, drawn anew for each: no image is left whole."""

    def change(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        pool = torch.cat([stretched(other, embeds.shape[1]) for other in others])  # [K, M, D]
        pick = torch.randint(len(pool), (embeds.shape[1],), generator=generator).to(pool.device)
        mixed = pool[pick, torch.arange(embeds.shape[1], device=pool.device)]
        return mixed[None].to(embeds.device, embeds.dtype).expand_as(embeds)

    return change


def stretched(memory: torch.Tensor, length: int) -> torch.Tensor:
    """[B, M, D] -> [B, length, D], by repeating or leaving out tokens evenly."""
    if memory.shape[1] == length:
        return memory
    index = torch.linspace(0, memory.shape[1] - 1, length).round().long()
    return memory[:, index.to(memory.device)]
