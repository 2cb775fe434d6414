"""Trace one step on torch's meta device: the decoder's forward and backward, where tensors have no values.

The trace goes through the real code, memory included: it counts the operations, and the bytes that the backward pass
keeps, and finds trained tensors that get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from keepsight.backbone import Backbone
from keepsight.checkpoints.bases import base_config
from keepsight.errors import KeepsightError
from keepsight.pvm.branch import MEMORY, PvmBranch
from keepsight.train.run.flops import ModelShape


def meta_model(source: str | Path, dtype: torch.dtype, eager: bool = False) -> Any:
    """A base on the meta device, from its config.json alone; with eager attention, or a kernel's."""
    kernel = {"attn_implementation": "eager"} if eager else {}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(base_config(source), dtype=dtype, **kernel)


class SeenImage:
    """Stands for the visual memory of one image per row in a trace: M rows of the decoder's width, seen by all text."""

    visual_mask = None

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds

    def states(self, name: str, project: Callable[[torch.Tensor], Any]) -> Any:
        """Keys and values of a block."""
        return project(self.embeds)

    def view(self, length: int, causal: bool) -> tuple[None, None]:
        """Nothing is hidden."""
        return None, None


@dataclass(frozen=True)
class Trace:
    """One forward and backward of the decoder, on shapes.

    Attributes:
        flops: operations, as torch counts them (attention over the full square, which causal kernels halve).
        kept: bytes that the forward keeps for the backward, without checkpointing.
        layers: decoder layers.
        learning: decoder layers that the backward passes through.
        boundary: bytes of one layer's input, which is all that checkpointing keeps of a layer.
        untrained: trained tensors that got no gradient; none, if all is well.
    """

    flops: float
    kept: int
    layers: int
    learning: int
    boundary: int
    untrained: tuple[str, ...]

    @property
    def checkpointed(self) -> int:
        """Bytes that checkpointing keeps: every layer's input, and all of one layer while it is recomputed."""
        return self.layers * self.boundary + math.ceil(self.kept / max(1, self.learning))


def trace(model: Any, rows: int, length: int, visual: int) -> Trace:
    """Run the decoder forward and backward on the meta device.

    Args:
        model: on the meta device, with what is learned on it and `requires_grad` as in training.
        rows: B.
        length: T, positions of a row.
        visual: M, visual tokens of a row.
    """
    from torch.utils.flop_counter import FlopCounterMode

    backbone = Backbone.of(model)
    norm: Any = Backbone.norm(backbone.layers[0])
    dtype: torch.dtype = norm.weight.dtype
    width = backbone.text_config.hidden_size
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    eager = backbone.decoder.config._attn_implementation == "eager"
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Kernels never keep the square of attention; torch takes the plain formula on the meta device, which does.
        square = not eager and tensor.dim() >= 3 and tensor.shape[-2] == length and tensor.shape[-1] in (length, visual)
        if storage._cdata not in weights and not square:
            kept[storage._cdata] = storage
        return tensor

    learns_rows = any(parameter.requires_grad for parameter in backbone.model.get_input_embeddings().parameters())
    arguments: dict[str, Any] = {}
    if any(isinstance(module, PvmBranch) for module in backbone.decoder.modules()):
        arguments[MEMORY] = SeenImage(torch.empty(rows, visual, width, dtype=dtype, device="meta"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    was_training = model.training
    model.train()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        embeds = torch.empty(rows, length, width, dtype=dtype, requires_grad=learns_rows)
        if "mrope" in str(getattr(backbone.text_config, "rope_parameters", "")):
            arguments["position_ids"] = torch.arange(length).expand(3, rows, -1)
        else:  # a finished mask keeps the decoder from looking for packed samples, which would need values
            arguments["attention_mask"] = torch.ones(rows, 1, length, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            try:
                states = backbone.decoder(inputs_embeds=embeds, use_cache=False, **arguments)
            except RuntimeError as error:
                if "BF16" not in str(error):
                    raise
                raise KeepsightError(
                    "This torch can trace a mixture of experts in bfloat16 only. Give --bf16 (or --dtype bfloat16), as "
                    "on a GPU, or use a newer torch (2.15 can do without)."
                ) from error
        loss = backbone.model.get_output_embeddings()(states.last_hidden_state).sum()
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    model.train(was_training)
    unused = [
        name
        for (name, _), gradient in zip(trained.items(), found, strict=True)
        if gradient is None and "embed_tokens" not in name  # its rows are looked up before the decoder
    ]
    return Trace(
        flops=float(counter.get_total_flops()),
        kept=sum(storage.nbytes() for storage in kept.values()),
        layers=len(backbone.layers),
        learning=round(ModelShape.of(model).trained_depth * len(backbone.layers)),
        boundary=rows * length * width * dtype.itemsize,
        untrained=tuple(unused),
    )
