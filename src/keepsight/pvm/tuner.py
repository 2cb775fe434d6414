"""The face to PEFT: attach, enable, disable, save, load and delete a persistent visual memory.

The branch hangs *beside* the layer's modules (`decoder.layers.i.visual_memory`), never around one of them: the base
model keeps every module and parameter name it had, so that LoRA adapters on the same model save and load as always.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightWarning
from keepsight.peft_method import MemoryBranch, MemoryTuner
from keepsight.pvm.config import PvmConfig
from keepsight.pvm.hooks import MEMORY, PvmRoute, in_flight, without_memory
from keepsight.pvm.kernels import attention_for
from keepsight.pvm.memory import VisualMemory
from keepsight.pvm.module import ParallelMlpBlock, PvmBlock

BRANCH = "visual_memory"  # name of the branch in its decoder layer; must not contain PEFT's prefix "pvm_"
_ROUTE = "_keepsight_pvm_route"


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
        norm: the layer's norm after the mixer, for the device and dtype of new blocks.
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
    def weight(self) -> torch.Tensor:
        """What PEFT takes device and dtype of new adapters from: a weight of the decoder layer."""
        return self._norm[0].weight

    def add_block(self, adapter_name: str, config: PvmConfig) -> None:
        """Add a block for `adapter_name`, on the device and in the dtype of the decoder layer."""
        block = make_block(config)
        if not next(block.parameters()).is_meta:  # low_cpu_mem_usage builds on meta; the weights come when loading
            block = block.to(self.weight.device, self.weight.dtype)
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
        in_flight.memory, in_flight.residual = kwargs.get(MEMORY), None
        return without_memory(mixer, args, kwargs)

    def take_residual(self, norm: nn.Module, args: tuple) -> None:
        """Pre-hook of the norm after the mixer: x [B, T, D] waits for the mlp."""
        in_flight.residual = args[0]

    def add_update(self, mlp: nn.Module, args: tuple, output: Any) -> Any:
        """Hook of the mlp: adds gate * out to its output [B, T, D]."""
        memory, x = in_flight.memory, in_flight.residual
        in_flight.memory = in_flight.residual = None
        if x is None:
            return output
        y, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        for name, block in self.active_blocks:
            update = self._look(name, block, memory, x) if block.reads_memory else self._think(block, memory, x)
            if update is not None:
                y = y + update.to(y.dtype)
        return y if rest is None else (y, *rest)

    def _look(self, name: str, block: Any, memory: VisualMemory | None, x: torch.Tensor) -> torch.Tensor | None:
        """The update [B, T, D] of a memory block; None where there is nothing to look at."""
        if memory is None:
            return _no_update(block)
        states = memory.states(f"{self.index}.{name}", block.project)
        if states is None:
            warnings.warn(
                f"The visual memory {name!r} was switched on after the images were read, so it has nothing to "
                "retrieve from them. Activate it before the prompt is read.",
                KeepsightWarning,
                stacklevel=2,
            )
            return _no_update(block)
        mask, keep = memory.view(x.shape[1], block.causal)
        if mask is not None:
            mask = mask.to(x.device)
        update = block(x, *states, mask, attention_for(self.text_config, mask))
        return update if keep is None else update.masked_fill(~keep.to(update.device), 0)

    def _think(self, block: Any, memory: VisualMemory | None, x: torch.Tensor) -> torch.Tensor:
        """The update [B, T, D] of the control's block, which has no memory; silent at visual positions too."""
        update = block(x)
        if memory is None or memory.visual_mask is None:
            return update
        return update.masked_fill(memory.visual_mask[..., None].to(update.device), 0)


def _no_update(block: nn.Module) -> torch.Tensor | None:
    """Nothing; in training a zero that touches every parameter.

    Data-parallel training waits for the gradient of every parameter on every rank, so a rank whose batch has no image
    must produce zeros, not silence.
    """
    parameters = [p for p in block.parameters() if p.requires_grad]
    if not (block.training and torch.is_grad_enabled() and parameters):
        return None
    return 0.0 * torch.stack([p.sum() for p in parameters]).sum()


class PvmModel(MemoryTuner):
    """PEFT's tuner for PVM. Use it through `peft.get_peft_model(vlm, PvmConfig())`."""

    prefix = "pvm_"
    tuner_layer_cls = PvmBranch
    config_cls = PvmConfig
    container = "pvm_blocks"
    no_merge = (
        "A persistent visual memory cannot be merged: it is a branch with an attention of its own, not a change of the "
        "base weights."
    )

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        backbone = Backbone.of(model)
        peft_config.resolve(backbone)
        names = "|".join(str(i) for i in peft_config.layers)
        peft_config.target_modules = rf"^{re.escape(backbone.decoder_path)}\.layers\.({names})$"
        if not hasattr(backbone.decoder, _ROUTE):
            setattr(backbone.decoder, _ROUTE, PvmRoute(backbone))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        branch = getattr(target, BRANCH, None)
        if branch is None:
            backbone = Backbone.of(self.model)
            branch = PvmBranch(int(target_name), target.post_attention_layernorm, backbone.text_config)
            branch._active_adapter = self.active_adapter
            target.add_module(BRANCH, branch)
            getattr(backbone.decoder, _ROUTE).add(int(target_name), branch)
        branch.add_block(adapter_name, peft_config)

    def _detach(self) -> None:
        decoder = Backbone.of(self.model).decoder
        getattr(decoder, _ROUTE).remove()
        delattr(decoder, _ROUTE)
        for layer in decoder.layers:
            if hasattr(layer, BRANCH):
                delattr(layer, BRANCH)
