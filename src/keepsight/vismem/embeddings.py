"""The visual embeddings as they enter the decoder: a warm start regresses onto them, a probe compares with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.vismem import scope


class VisualEmbeddings:
    """What `watch_visual_embeddings` saw enter the decoder."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.inputs: torch.Tensor | None = None

    def rows(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Per row of the prompt [B, T] the embeddings at its visual positions [M, D]."""
        assert self.inputs is not None, "the decoder was not called"
        mask = self.backbone.visual_mask(input_ids)
        return [row[where].detach() for row, where in zip(self.inputs, mask, strict=True)]


@contextlib.contextmanager
def watch_visual_embeddings(backbone: Backbone) -> Iterator[VisualEmbeddings]:
    """Note the input embeddings [B, T, D] of the decoder's next call in this block, visual ones in their places."""
    seen = VisualEmbeddings(backbone)

    def note(decoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if seen.inputs is None and not scope.is_base_only():
            seen.inputs = kwargs["inputs_embeds"]

    handle = backbone.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
