"""Attention of latents back to the image while they are formed, in the former's own pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.diagnose.instruments.layout import VisualLayout
from keepsight.diagnose.instruments.metering import Metered, scores_of
from keepsight.vismem.formers import Formers
from keepsight.vismem.memory import Formation
from keepsight.vismem.tokens import SHORT
from keepsight.vismem.vision import VisionWalk


@dataclass(frozen=True)
class FormingTrace:
    """Attention of N latents while they were formed, in L layers (of the language model, or the vision encoder).

    Attributes:
        layers: [L] int64.
        image: [L, N] float32, share on the image (visual states, or patches), mean over heads.
        uniform: the share that the image would get from even attention.
        where: [N, M] float32, share on each visual token, mean over layers and heads; None where patches do not stand
            in the order of visual tokens.
        layout: where the M visual tokens lie; None if it is not known.
    """

    layers: np.ndarray
    image: np.ndarray
    uniform: float
    where: np.ndarray | None
    layout: VisualLayout | None = None


@torch.no_grad()
def watch_forming(
    formers: Formers, kind: str, formation: Formation, layout: VisualLayout | None = None
) -> FormingTrace | None:
    """Form one memory again and see where it looks.

    Args:
        formers: of the adapter.
        kind: "short" or "long".
        formation: what it is formed from.
        layout: where its visual tokens lie.

    Returns:
        What was seen; None for a model none of whose attention can be watched.
    """
    if kind == SHORT:
        watched = _ShortFormers(formers.backbone, formers.memory, formers.config)
        watched.form(kind, [formation])
        return watched.trace(formation, layout)
    return _watch_long(formers, formation, layout)


def _watch_long(formers: Formers, formation: Formation, layout: VisualLayout | None) -> FormingTrace | None:
    backbone, config = formers.backbone, formers.config
    layers = [i for i, layer in enumerate(backbone.layers) if Backbone.has_softmax_attention(layer)]
    visual, latents = len(formation.sight.visual), config.num_long
    text = len(formation.text)
    if config.max_text_states is not None:
        text = min(text, config.max_text_states)
    total = visual + text + config.num_queries + latents
    padding = int(backbone.needs_padding)
    seen: dict[int, torch.Tensor] = {}

    def look(row: int, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict) -> None:
        scores = scores_of(query[:, :, -latents:], key[:, :, padding:], kwargs)[0]  # [H, N, K]
        later = torch.ones(latents, total, dtype=torch.bool, device=key.device).triu(total - latents + 1)
        scores = scores.masked_fill(later, float("-inf"))
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            part = mask[0, :, -latents:, padding : padding + total]
            scores = scores.masked_fill(~part, float("-inf")) if mask.dtype == torch.bool else scores + part.float()
        seen[row] = scores.softmax(-1).mean(0)[:, :visual].cpu()

    metered = Metered([Backbone.mixer(backbone.layers[i]) for i in layers], look)
    metered.on()
    try:
        formers.form("long", [formation])
    finally:
        metered.off()
    if len(seen) < len(layers):
        return None
    weights = torch.stack([seen[row] for row in sorted(seen)])  # [L, N, M]
    return FormingTrace(
        np.array(layers, np.int64), weights.sum(-1).numpy(), visual / total, weights.mean(0).numpy(), layout
    )


class _ShortFormers(Formers):
    """The formers with a walk that keeps the attention of the memory's positions."""

    def _walk(self) -> VisionWalk:
        self.walk = _WatchedWalk(self.backbone, self.memory.short_bank)
        return self.walk

    def trace(self, formation: Formation, layout: VisualLayout | None) -> FormingTrace | None:
        patches, count = formation.sight.patches, self.config.num_short
        if not self.walk.seen or patches is None:
            return None
        square = self.backbone.merge_side**2
        layers = sorted(self.walk.seen)
        first = self.config.num_queries
        rows = torch.stack([self.walk.seen[i][:, first:, :].mean(0) for i in layers])  # [L, N * s * s, S + E]
        rows = rows.unflatten(1, (count, square)).mean(2)
        total, size = rows.shape[-1], len(patches.x)
        on_image = rows[..., :size]
        where = None
        in_order = self.backbone.patches_are_in_order
        if in_order and size == len(formation.sight.visual) * square and not self.backbone.windowed_vision_blocks:
            where = on_image.mean(0).unflatten(-1, (-1, square)).sum(-1).numpy()
        return FormingTrace(
            np.array(layers, np.int64),
            on_image.sum(-1).numpy(),
            size / total,
            where,
            layout if where is not None else None,
        )


class _WatchedWalk(VisionWalk):
    """The walk through the vision encoder, keeping the appended positions' attention in whole-image blocks."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: dict[int, torch.Tensor] = {}

    def _look(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if len(key) > len(query):  # in window blocks they see each other only
            q, k = query.transpose(0, 1).float(), key.transpose(0, 1).float()
            self.seen[index] = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).cpu()  # [H, E, S + E]
        return super()._look(index, query, key, value)
