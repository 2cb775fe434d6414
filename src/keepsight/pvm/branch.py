"""The branch of one decoder layer: its blocks, one per adapter, and the hooks that add them to the layer's output.

Between mixer and mlp of ONE decoder layer the memory and x wait in a thread-local slot: set and used within one layer
call in one thread, so that gradient checkpointing, which calls the layer's forward again but not the layer's own hooks,
takes the same route a second time. Whether the memory is on travels with the memory, so that the recomputation finds
what the forward found, in whatever thread and scope it happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keepsight.peft_method import MemoryBranch
from keepsight.pvm.config import PvmConfig
from keepsight.pvm.fused import Fused
from keepsight.pvm.graphs import CompiledFork
from keepsight.pvm.memory import VisualMemory
from keepsight.pvm.module import ParallelMlpBlock, PvmBlock
from keepsight.pvm.streams import Fork, may_overlap
from keepsight.pvm.work import Work, added
from keepsight.threads import PerThread

BRANCH = "visual_memory"  # name of the branch in its decoder layer; must not contain PEFT's prefix "pvm_"
MEMORY = "keepsight_visual_memory"  # the keyword argument in which the memory travels


@dataclass
class InFlight:
    """What waits between two hooks of one call, in one thread. Nothing in a layer yields to another task."""

    memory: Any = None  # between mixer and mlp of one layer
    residual: torch.Tensor | None = None  # [B, T, D], likewise
    fork: Fork | CompiledFork | None = None  # likewise, where the branch runs beside the mlp
    reached: dict[int, str] | None = None  # layer -> the last hook that fired, while the decoder runs
    call: Any = None  # while the VLM runs: see hooks.py
    encoded: bool = False  # the vision encoder has run, and the VLM not since

    def note(self, index: int, stage: str) -> None:
        """Hook `stage` of layer `index` has fired."""
        if self.reached is not None:  # None in a recomputation, long after the call
            self.reached[index] = stage


flights = PerThread(InFlight)
#: The hooks of a layer, in the order in which they fire.
MIXER, NORM, MLP = "the token mixer", "the norm before the mlp", "the mlp"


def without_memory(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Keep our keyword argument away from a module that does not expect it."""
    if MEMORY not in kwargs:
        return None
    return args, {name: value for name, value in kwargs.items() if name != MEMORY}


def make_block(config: PvmConfig) -> Any:
    """A new block as a resolved config describes it: a `PvmBlock`, or the control's `ParallelMlpBlock`."""
    if config.branch == "mlp":
        return ParallelMlpBlock(config.block_shape, config.init_gate)
    block = PvmBlock(config.block_shape, config.init_gate, config.detach_visual)
    block.causal = config.causal
    return block


class PvmBranch(nn.Module, MemoryBranch):
    """The PVM blocks of one decoder layer, one per adapter, and the hooks that apply them.

    Args:
        index: index of the decoder layer.
        norm: a norm of the layer, for the device and dtype of new blocks.
        text_config: configuration of the decoder; its attention implementation is asked at every call.
    """

    adapter_layer_names = ("pvm_blocks",)

    def __init__(self, index: int, norm: Any, text_config: Any):
        super().__init__()
        self.index, self.text_config = index, text_config
        self._norm = (norm,)  # in a tuple, so that it does not become a child of the branch
        self.pvm_blocks = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    @property
    def beside(self) -> Any:
        """The norm."""
        return self._norm[0]

    def add_block(self, adapter_name: str, config: PvmConfig) -> None:
        """Add a block for `adapter_name`, on the device and in the dtype of the decoder layer."""
        block = make_block(config)
        if not next(block.parameters()).is_meta:  # low_cpu_mem_usage builds on meta; the weights come when loading
            block = block.to(self.place, self.weight.dtype)
        others = self.pvm_blocks.keys() - {adapter_name}
        self.pvm_blocks[adapter_name] = block
        self.set_adapter(self.active_adapters if others else adapter_name, inference_mode=config.inference_mode)

    @property
    def active_blocks(self) -> list[tuple[str, Any]]:
        """(adapter name, block) of every adapter that is switched on."""
        if self.is_off:
            return []
        return [(name, self.pvm_blocks[name]) for name in self.active_adapters if name in self.pvm_blocks]

    def take_memory(self, mixer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of the token mixer: the memory of this call waits for the mlp."""
        flight = flights.here
        flight.memory = kwargs.get(MEMORY)  # where mixer and mlp stand side by side, x waits already
        if flight.memory is not None:
            flight.note(self.index, MIXER)
            if isinstance(flight.memory, VisualMemory):
                flight.memory.check_attention(kwargs, self.text_config)
        return without_memory(mixer, args, kwargs)

    def take_residual(self, norm: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of what the mlp's branch begins with: x [B, T, D] waits for its end."""
        flight = flights.here
        flight.residual = x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        memory, flight.fork = flight.memory, None
        if memory is not None:
            flight.note(self.index, NORM)
            if may_overlap(x, memory.visual_mask is not None):
                works = [self._work(name, block, memory, x) for name, block in self.active_blocks]
                fork = CompiledFork if torch.compiler.is_compiling() else Fork
                flight.fork = fork(x, [work for work in works if work is not None])

    def add_update(self, mlp: nn.Module, args: tuple, output: Any) -> Any:
        """Hook of what the mlp's branch ends with: adds gate * out to its output [B, T, D]."""
        flight = flights.here
        memory, x, fork = flight.memory, flight.residual, flight.fork
        flight.memory = flight.residual = flight.fork = None
        if memory is None or x is None:  # off; a call in which it is on and this happens ends in an error (hooks.py)
            return output
        flight.note(self.index, MLP)
        y, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if fork is not None:
            y = fork.join(y)
        else:
            updates = [self._look(name, block, memory, x) for name, block in self.active_blocks]
            y = added(y, [update for update in updates if update is not None])
        return y if rest is None else (y, *rest)

    def _look(self, name: str, block: Any, memory: VisualMemory, x: torch.Tensor) -> torch.Tensor | Fused | None:
        """gate * out [B, T, D] of one block; None where there is nothing to look at."""
        work = self._work(name, block, memory, x)
        return _no_update(block) if work is None else work.start(x)

    def _work(self, name: str, block: Any, memory: VisualMemory, x: torch.Tensor) -> Work | None:
        """What a block has to do for x [B, T, D]; None where there is nothing to look at."""
        if not block.reads_memory:  # the control's, silent at visual positions too
            text = None if memory.visual_mask is None else ~memory.visual_mask[..., None]
            return Work(block, (), None, text, self.text_config)
        states = memory.states(f"{self.index}.{name}", block.project)
        if states is None:
            return None
        mask, keep = memory.view(x.shape[1], block.causal)
        if mask is not None:
            mask = mask.to(x.device)
        return Work(block, states, mask, keep, self.text_config)


def _no_update(block: nn.Module) -> torch.Tensor | None:
    """Nothing; in training a zero that touches every parameter.

    Data-parallel training waits for the gradient of every parameter on every rank, so a rank whose batch has no image
    must produce zeros, not silence.
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not (block.training and torch.is_grad_enabled() and parameters):
        return None
    return 0.0 * torch.stack([p.sum() for p in parameters]).sum()
