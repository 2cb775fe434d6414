"""The route by which latents and special tokens reach an unforked model, and what is recorded on the way.

    embedding      pre-hook   ids that the base has no row for are hidden from it
                   hook       the special tokens' rows and the waiting latents are written over its output
    head           hook       the special tokens' logits are written over, or appended to, its output
    vision blocks  pre-hook   while generating: what enters the encoder is noted (that is what memory is formed from)
    decoder        hook       while generating: the last hidden states are noted
    decoder layers            while a memory is formed: the low-rank updates are added to the projections' outputs, and
                              PEFT layers of other adapters pass their base layer's output through

All hooks are permanent and silent unless a scope (`scope.py`) says otherwise; nothing is kept on the model. Under
gradient checkpointing a layer is computed again outside the scope, so the adapter also travels in the decoder's keyword
arguments, from which the token mixer's hook restores it.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from keepsight.backbone import Backbone
from keepsight.vismem import scope
from keepsight.vismem.config import PROJECTIONS
from keepsight.vismem.formers import BANK
from keepsight.vismem.vision import bare

#: Token ids of the embedding call in progress.
_ids: ContextVar[torch.Tensor | None] = ContextVar("keepsight_vismem_ids", default=None)
#: Labels of the model call in progress.
_labels: ContextVar[Any] = ContextVar("keepsight_vismem_labels", default=None)
#: A layer is being computed again for its gradient.
_again: ContextVar[bool] = ContextVar("keepsight_vismem_again", default=False)


class VisMemRoute:
    """All hooks of VisMem on one model, shared by its adapters.

    Args:
        backbone: the model's parts.
        branch: the `VisMemBranch` that holds the adapters.
    """

    def __init__(self, backbone: Backbone, branch: Any):
        self.branch = branch
        model = backbone.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        self._handles: list[Any] = [
            embedding.register_forward_pre_hook(self._hide_ids),
            embedding.register_forward_hook(self._write_rows),
            head.register_forward_hook(self._write_logits),
            model.register_forward_pre_hook(self._take_labels, with_kwargs=True),
            model.register_forward_hook(self._compute_loss, with_kwargs=True),
            backbone.decoder.register_forward_hook(_note_hidden),
        ]
        for index, block in enumerate(backbone.vision_blocks):
            note = functools.partial(_note_vision, index)
            self._handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
        rotary = backbone.family.vision.rotary
        if rotary is not None:
            module: Any = getattr(backbone.vision_tower, rotary)
            self._handles.append(module.register_forward_pre_hook(_note_coordinates, with_kwargs=True))
        layers: Any = backbone.layers
        for index, layer in enumerate(layers):
            mixer = Backbone.mixer(layer)
            self._handles.append(mixer.register_forward_pre_hook(_restore_scope, with_kwargs=True))
            self._handles.append(layer.mlp.register_forward_hook(_end_scope, always_call=True))
            if Backbone.has_softmax_attention(layer):
                for name in PROJECTIONS:
                    projection = bare(getattr(mixer, name))
                    update = functools.partial(_add_update, index, name)
                    self._handles.append(projection.register_forward_hook(update))
        self._shielded: set[int] = set()

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()

    def shield(self, model: nn.Module) -> None:
        """Make other adapters' PEFT layers keep out of formations; looks for new ones every time."""
        for module in model.modules():
            if (
                isinstance(module, BaseTunerLayer)
                and hasattr(module, "base_layer")
                and id(module) not in self._shielded
            ):
                self._shielded.add(id(module))
                self._handles.append(module.register_forward_hook(_base_output, with_kwargs=True))

    def _hide_ids(self, embedding: Any, args: tuple) -> tuple | None:
        active = self.branch.active
        if active is None or scope.are_only_words():
            _ids.set(None)
            return None
        ids = args[0]
        _ids.set(ids)
        rows = embedding.weight.shape[0]
        return (ids.masked_fill(ids >= rows, 0), *args[1:]) if max(self.branch.config.token_ids) >= rows else None

    def _write_rows(self, embedding: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        ids = _ids.get()
        _ids.set(None)
        if ids is None:
            return None
        output = self.branch.active.rows.embed(ids, output, self.branch.config.token_ids)
        splice = scope.current_splice()
        if splice is None or splice.mask.shape != ids.shape:
            return output
        values = splice.values.to(output.device, output.dtype)
        return output.masked_scatter(splice.mask.to(output.device)[..., None], values)

    def _write_logits(self, head: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        active = self.branch.active
        return None if active is None else active.rows.score(args[0], output, self.branch.config.token_ids)

    # With more logits than the base's vocabulary, transformers' own loss would fail on the shape.

    def _take_labels(self, model: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        _labels.set(None)
        if kwargs.get("labels") is None or self.branch.active is None:
            return None
        _labels.set(kwargs["labels"])
        return args, {name: value for name, value in kwargs.items() if name != "labels"}

    def _compute_loss(self, model: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        labels = _labels.get()
        _labels.set(None)
        if labels is None:
            return None
        more = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
        loss = model.loss_function(
            logits=output["logits"], labels=labels, vocab_size=output["logits"].shape[-1], **more
        )
        output["loss"] = loss
        return output


def _note_hidden(decoder: Any, args: tuple, output: Any) -> None:
    watch = scope.current_watch()
    if watch is not None:
        watch.hidden = output.last_hidden_state


def _note_coordinates(rotary: Any, args: tuple, kwargs: dict) -> None:
    watch = scope.current_watch()
    if watch is not None:
        coordinates = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        watch.vision_calls.append({"coordinates": coordinates, "cu_seqlens": {}})


def _note_vision(index: int, block: Any, args: tuple, kwargs: dict) -> None:
    watch = scope.current_watch()
    if watch is None:
        return
    x = args[0] if args else kwargs["hidden_states"]
    if index == 0:
        if not watch.vision_calls or "x" in watch.vision_calls[-1]:
            watch.vision_calls.append({"cu_seqlens": {}})
        watch.vision_calls[-1]["x"] = x
        watch.vision_calls[-1]["rotary"] = kwargs.get("position_embeddings")
    if kwargs.get("cu_seqlens") is not None:
        watch.vision_calls[-1]["cu_seqlens"][index] = kwargs["cu_seqlens"]


def _add_update(index: int, name: str, projection: Any, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
    bank = scope.current_bank()
    update = bank.get(index, name) if bank is not None else None
    return None if update is None else output + update(args[0]).to(output.dtype)


def _base_output(layer: Any, args: tuple, kwargs: dict, output: Any) -> Any:
    return bare(layer)(*args, **kwargs) if scope.is_base_only() else None


def _restore_scope(mixer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if BANK not in kwargs:
        return None
    if scope.current_bank() is None:
        scope.enter_again(kwargs[BANK])
        _again.set(True)
    return args, {name: value for name, value in kwargs.items() if name != BANK}


def _end_scope(mlp: Any, args: tuple, output: Any) -> None:
    if _again.get():
        scope.leave_again()
        _again.set(False)
