"""The route by which a request's visual memory reaches the blocks in an unforked model.

    vlm          pre-hook   if pixels came in: where they go ([B, T] mask) joins the keyword arguments
    decoder      pre-hook   the mask becomes a `VisualMemory` (with what the cache remembers), as a keyword argument
      layer i      the decoder hands its keyword arguments to every layer, and the layer to its token mixer; layers
                   without a block ignore ours, as they ignore all they do not know
        mixer      pre-hook   takes the memory out
        norm       pre-hook   takes the residual stream x
        mlp        hook       adds gate * out
    decoder      hook       new projections are stored in the cache

Nothing is kept on the model. Between mixer and mlp of ONE decoder layer the memory and x wait in a thread-local slot:
set and used within one layer call in one thread, so that gradient checkpointing, which calls the layer's forward
again but not the layer's own hooks, takes the same route a second time.

All hooks are module-level functions or bound methods of the branch: copies and pickles of the model keep working.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from keepsight.backbone import Backbone
from keepsight.compat import find_cache, find_output_cache
from keepsight.pvm.memory import VisualCacheLayer, VisualMemory

MASK = "keepsight_visual_mask"
MEMORY = "keepsight_visual_memory"


class InFlight(threading.local):
    """What waits between the mixer and the mlp of one decoder layer, per thread.

    A thread-local and no context variable, because torch.compile cannot trace the latter; nothing in a layer yields
    to another task, so both are equally safe.
    """

    memory: VisualMemory | None = None
    residual: torch.Tensor | None = None  # [B, T, D]


in_flight = InFlight()


def without_memory(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Pre-hook that keeps our keyword arguments away from modules that do not expect them."""
    if MEMORY not in kwargs and MASK not in kwargs:
        return None
    return args, {name: value for name, value in kwargs.items() if name not in (MASK, MEMORY)}


class PvmRoute:
    """The hooks on the VLM and its decoder. One per model, shared by all PVM adapters on it.

    Args:
        backbone: the model's parts.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.branches: dict[int, Any] = {}  # layer index -> PvmBranch
        vlm, decoder = backbone.vlm, backbone.decoder
        self._vlm_arguments = list(inspect.signature(vlm.forward).parameters)
        self._handles = [
            vlm.register_forward_pre_hook(self._find_images, with_kwargs=True),
            decoder.register_forward_pre_hook(self._make_memory, with_kwargs=True),
            decoder.register_forward_hook(self._store_memory, with_kwargs=True),
        ]
        # Some families pass all keyword arguments on to the vision tower.
        self._handles += [
            child.register_forward_pre_hook(without_memory, with_kwargs=True)
            for child in vlm.children()
            if child is not decoder
        ]

    def add(self, index: int, branch: Any) -> None:
        """Let the memory through to the branch of layer `index`."""
        layer: Any = self.backbone.layers[index]
        self.branches[index] = branch
        self._handles += [
            Backbone.mixer(layer).register_forward_pre_hook(branch.take_memory, with_kwargs=True),
            layer.post_attention_layernorm.register_forward_pre_hook(branch.take_residual),
            layer.mlp.register_forward_hook(branch.add_update),
        ]

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()

    def _find_images(self, vlm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not any(branch.active_blocks for branch in self.branches.values()):
            return None

        by_position = dict(zip(self._vlm_arguments, args, strict=False))

        def argument(name: str) -> Any:
            return kwargs.get(name, by_position.get(name))

        modalities = self.backbone.given_modalities(argument)
        if not modalities:
            return None
        mask = self.backbone.visual_mask(argument("input_ids"), argument("inputs_embeds"), modalities)
        return args, {**kwargs, MASK: mask}

    def _make_memory(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        mask = kwargs.pop(MASK, None)
        cache = find_cache(args, kwargs)
        past = VisualCacheLayer.of(cache)
        if mask is None and past is None:
            return None
        start = cache.get_seq_length() if cache is not None else 0
        if past is not None and isinstance(start, int):  # a tensor length means a static cache, which is never cropped
            past.truncate(start)
        if mask is not None and mask.any():
            _refuse_packing(kwargs)
            kwargs[MEMORY] = VisualMemory(kwargs["inputs_embeds"], mask, past, int(start))
        elif past is not None and past.states:
            kwargs[MEMORY] = VisualMemory(past=past)
        return args, kwargs

    @staticmethod
    def _store_memory(decoder: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        memory = kwargs.get(MEMORY)
        cache = find_output_cache(output)
        if cache is None:
            cache = find_cache(args, kwargs)
        if memory is not None and cache is not None:
            memory.store(cache)


def _refuse_packing(kwargs: dict) -> None:
    if any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
        raise ValueError(
            "Several samples are packed into one row (cu_seq_lens are given), and a visual memory would show each of "
            "them the images of all. Train with one sample per row: packing=False, padding_free=False."
        )
