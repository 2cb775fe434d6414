"""The route by which a request's visual memory reaches the blocks in an unforked model, and the checks that it did.

    vlm          pre-hook   a `Given` is opened: what the VLM was given
      tower        hook       the vision encoder ran in this call
    decoder      pre-hook   the images of the call become a `VisualMemory` (with what the cache remembers), as a keyword
                            argument; without images an empty one, so that a block knows that it is on
      layer i      the decoder hands its keyword arguments to every layer, and the layer to its token mixer; layers
                   without a block ignore ours, as they ignore all they do not know
        mixer      pre-hook   takes the memory out                                   (these three: branch.py)
        norm       pre-hook   takes the residual stream x, where it enters the feed-forward network's branch
        mlp        hook       adds gate * out to what leaves that branch
    decoder      hook       every block was reached; new projections are stored in the cache
    vlm          hook       the decoder was reached; the `Given` is closed

Nothing is kept on the model. All hooks are module-level functions or bound methods of route and branch: copies and
pickles of the model keep working.

A memory that is on and an image that was given end in "read" or in an error that says what was looked for. What the
route depends on are names in others' code, which change; so it asks what things *are* (a cache is a `Cache`, pixels are
what made the vision encoder run), and checks at the end of each call that it got through.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from keepsight.backbone import Backbone
from keepsight.compat import find_cache, find_output_cache
from keepsight.errors import KeepsightError
from keepsight.peft_method import refuse_adapter_names
from keepsight.pvm.branch import MEMORY, MIXER, MLP, NORM, flights
from keepsight.pvm.cache import VisualCache
from keepsight.pvm.finding import ASK, Given, ImageFinder
from keepsight.pvm.memory import VisualMemory
from keepsight.pvm.packing import find_packing


class PvmRoute:
    """The hooks on the VLM and its decoder. One per model, shared by all PVM adapters on it.

    Args:
        backbone: the model's parts.
    """

    def __init__(self, backbone: Backbone):
        self.backbone, self.images = backbone, ImageFinder(backbone)
        self.branches: dict[int, Any] = {}  # layer index -> PvmBranch
        vlm, decoder = backbone.vlm, backbone.decoder
        self._vlm_arguments = list(inspect.signature(vlm.forward).parameters)
        self._handles = [
            vlm.register_forward_pre_hook(self._open_call, with_kwargs=True),
            vlm.register_forward_hook(self._close_call, always_call=True),
            backbone.vision_tower.register_forward_hook(_note_tower),
            decoder.register_forward_pre_hook(self._make_memory, with_kwargs=True),
            decoder.register_forward_hook(self._store_memory, with_kwargs=True),
        ]

    def add(self, index: int, branch: Any) -> None:
        """Let the memory through to the branch of layer `index`."""
        layer = self.backbone.layers[index]
        parts = Backbone.parts(layer)
        self.branches[index] = branch
        self._handles += [
            Backbone.mixer(layer).register_forward_pre_hook(branch.take_memory, with_kwargs=True),
            layer.get_submodule(parts.enter).register_forward_pre_hook(branch.take_residual, with_kwargs=True),
            layer.get_submodule(parts.leave).register_forward_hook(branch.add_update),
        ]

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()

    @property
    def _is_on(self) -> bool:
        return any(branch.active_blocks for branch in self.branches.values())

    @property
    def _reads(self) -> bool:
        """Whether any block that is on looks at images (the control does not)."""
        return any(block.reads_memory for branch in self.branches.values() for _, block in branch.active_blocks)

    # The VLM

    def _open_call(self, vlm: nn.Module, args: tuple, kwargs: dict) -> None:
        if "adapter_names" in kwargs and self._is_on:
            refuse_adapter_names(kwargs, next(iter(self.branches.values())).active_adapters[0])
        flights.here.call = Given(dict(zip(self._vlm_arguments, args, strict=False)) | kwargs)
        flights.here.encoded = False

    def _close_call(self, vlm: nn.Module, args: tuple, output: Any) -> None:
        call, flights.here.call = flights.here.call, None
        if output is not None and call is not None and not call.decoder_ran and self._is_on:
            raise KeepsightError(
                f"{type(vlm).__name__} ran, and {self.backbone.decoder_path} was not called as a module inside it, "
                "where the visual memory waits for what enters the decoder. " + ASK
            )

    # The decoder

    def _make_memory(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if (
            torch.compiler.is_compiling()
            and self._is_on
            and self.images.may_be_brought(flights.here.call, args, kwargs)
        ):
            return _outside_of_graphs(self._make, decoder, args, kwargs)
        return self._make(decoder, args, kwargs)

    def _make(self, decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call, flights.here.reached = flights.here.call, {}
        flights.here.memory = flights.here.residual = None  # of a call that ended in an error
        if call is not None:
            call.decoder_ran = True
        if MEMORY in kwargs or not self._is_on:
            return None
        if call is None and flights.here.encoded:
            flights.here.encoded = False
            raise KeepsightError(
                f"The vision encoder ran and {self.backbone.decoder_path} was called, but not as a part of a call of "
                f"{type(self.backbone.vlm).__name__}, where the visual memory learns what is an image. " + ASK
            )
        cache = find_cache(args, kwargs)
        past = VisualCache.of(cache)
        if cache is not None:
            if past is None and self._reads:
                _refuse_foreign(cache)
            start = cache.get_seq_length()
            if past is not None and not isinstance(start, torch.Tensor):  # of a static cache: never rewound unsaid
                past.truncate(start)
            if past is not None and past.missed is not None and self._reads:
                raise KeepsightError(
                    f"The KV cache holds an image that was read while the visual memory was off (at position "
                    f"{past.missed} and behind), so the memory has nothing to retrieve from it. Keep the memory on, or "
                    "off, for as long as a cache is used."
                )
        else:
            start = 0
        mask, embeds = self.images.found(call, args, kwargs, start, self._reads)
        if mask is None:
            memory = VisualMemory(past=past)
        else:
            assert embeds is not None
            given = None if call is None else call.arguments.get("attention_mask")
            fills = self._fills_cache(decoder, cache, kwargs)
            packing = find_packing(kwargs, embeds, self.backbone.text_config, fills, given)
            memory = VisualMemory(embeds, mask, past, int(start), packing)
        return args, {**kwargs, MEMORY: memory}

    def _fills_cache(self, decoder: Any, cache: Any, kwargs: dict) -> bool:
        """Whether the call will write to a KV cache, as far as can be known before it."""
        if cache is not None:
            return True
        if decoder.training and torch.is_grad_enabled() and getattr(decoder, "gradient_checkpointing", False):
            return False
        given = kwargs.get("use_cache")
        return bool(getattr(self.backbone.text_config, "use_cache", False) if given is None else given)

    def _store_memory(self, decoder: Any, args: tuple, kwargs: dict, output: Any) -> None:
        reached, flights.here.reached = flights.here.reached or {}, None
        cache = find_output_cache(output)
        if cache is None:
            cache = find_cache(args, kwargs)
        memory = kwargs.get(MEMORY)
        if memory is None:
            if cache is not None and flights.here.call is not None:
                self._note_missed(cache, args, kwargs)
            return
        self._check_reached(decoder, reached)
        if not isinstance(memory, VisualMemory):  # a stand-in of our own
            return
        if cache is not None:
            VisualCache.mark(cache)
            if memory.visual_mask is not None:
                _outside_of_graphs(memory.store, cache)
        elif self._fills_cache(decoder, None, kwargs) and not (decoder.training and torch.is_grad_enabled()):
            raise KeepsightError(
                f"{self.backbone.decoder_path} was to fill a KV cache, and no KV cache was found: looked for "
                f"an instance of transformers' Cache among its arguments ({', '.join(kwargs)}) and in its output "
                f"({type(output).__name__}). The next call would be without its memory. " + ASK
            )

    def _note_missed(self, cache: Any, args: tuple, kwargs: dict) -> None:
        """The memory is off, and may be on when this cache is used again: say in it whether it will lack an image."""
        has_image, kept = bool(self.images.modalities(flights.here.call)), VisualCache.of(cache)
        if not has_image and kept is not None:
            return
        embeds = self.backbone.decoder_input(args, kwargs)
        length = cache.get_seq_length()
        if not has_image and isinstance(length, torch.Tensor):
            return
        start = int(length) - (0 if embeds is None else embeds.shape[1])
        if has_image:
            kept = VisualCache.mark(cache)
            kept.missed = start if kept.missed is None else kept.missed
            kept.attach(cache)
        elif start == 0:
            VisualCache.mark(cache)

    def _check_reached(self, decoder: Any, reached: dict[int, str]) -> None:
        """Raises KeepsightError if a layer ran without the blocks that are on in it."""
        for index, branch in self.branches.items():
            if reached.get(index) == MLP or index >= decoder.config.num_hidden_layers or not branch.active_blocks:
                continue
            last, layer = reached.get(index), self.backbone.layers[index]
            parts = Backbone.parts(layer)
            stage = {NORM: parts.enter, MLP: f"the {parts.leave}"}.get(last or "", last)
            found = f"was last seen at {stage}" if last else f"never came to {MIXER} (as the keyword argument {MEMORY})"
            raise KeepsightError(
                f"Decoder layer {index} ran without its visual memory, which {found}: looked for calls, as modules, of "
                f"{type(Backbone.mixer(layer)).__name__}, {parts.enter} and {parts.leave} inside "
                f"{type(layer).__name__}. " + _COMPILED + ASK
            )


_COMPILED = (
    "If the model is compiled, set torch._dynamo.config.skip_nnmodule_hook_guards = False before: torch.compile runs "
    "one layer's graph for the next, and by default does not look at their hooks. "
)


@torch.compiler.disable(
    reason="keepsight reads images, and looks for them in inputs_embeds, outside of compiled graphs. Compile without "
    "fullgraph=True, or only the calls behind the prompt (input_ids and a cache), which are one graph"
)
def _outside_of_graphs(function: Any, *args: Any) -> Any:
    """What depends on values, warns, or asks what a caller said: a graph would keep the first call's answer."""
    return function(*args)


def _note_tower(tower: nn.Module, args: tuple, output: Any) -> None:
    if flights.here.call is not None:
        flights.here.call.tower_ran = True
    else:  # `generate` encodes the images before it calls the model
        flights.here.encoded = True


def _refuse_foreign(cache: Any) -> None:
    """Raises KeepsightError if a KV cache that no route has seen is not empty."""
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return  # asking would break the graph; `generate` compiles only what comes after the prompt
    if int(length) > 0:
        raise KeepsightError(
            f"The KV cache ({type(cache).__name__}) holds {int(length)} positions that this visual memory did not see "
            "being read: looked for its own entry in the cache and found none. They were read by another model, before "
            "the memory was attached, or copied into a new cache; an image among them would be missing from the "
            "memory. Read the prompt with this model, and hand on the cache object that it filled (copy.deepcopy is "
            "fine)."
        )
