"""The logit lens: KL divergence of each layer's own prediction from the final one.

KL(P_final || P_layer) in nats, where P_layer is what the model would predict if the layer's output went straight
through the final norm and the head (paper 2605.00814). A memory that helps settles predictions at shallower depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.errors import UnsupportedModelError

CHUNK = 64  # positions whose vocabulary-wide distributions are held at once


@dataclass(frozen=True)
class LensTrace:
    """KL(P_final || P_layer).

    Attributes:
        kl: [P, L] float32, nats; P positions of the text, L decoder layers (the last is about 0 by definition).
        positions: [P] int64, which token of the text is predicted.
    """

    kl: np.ndarray
    positions: np.ndarray

    @property
    def by_depth(self) -> np.ndarray:
        """Mean over positions [L]."""
        return self.kl.mean(0)

    def settled(self, threshold: float = 0.5) -> np.ndarray:
        """First layer [P] from which the prediction stays within `threshold` nats of the final one."""
        above = self.kl > threshold
        return np.where(above.any(1), self.kl.shape[1] - above[:, ::-1].argmax(1), 0)


@torch.no_grad()
def logit_lens(
    model: Any, inputs: dict[str, torch.Tensor], text: int, every: int = 1, places: torch.Tensor | None = None
) -> LensTrace:
    """Read a whole sequence once and compare every layer's prediction with the final one.

    Args:
        model: a supported VLM, with or without adapters.
        inputs: one row; the prompt with the text behind it.
        text: how many tokens at the end of `inputs` are the text whose predictions are examined.
        every: examine every n-th of them.
        places: [n] which of those tokens are examined at all, e.g. where a text with memories in it has its words;
            positions then count these.

    Raises:
        UnsupportedModelError: if the model has no final norm and head to look through.
    """
    backbone = Backbone.of(model)
    head = backbone.model.get_output_embeddings()
    norm = getattr(backbone.decoder, "norm", None)
    if head is None or norm is None:
        raise UnsupportedModelError(
            f"The logit lens needs the decoder's final norm and the model's head; {type(backbone.model).__name__} "
            f"has {'no head' if head is None else 'no norm'}."
        )
    places = torch.arange(text) if places is None else places
    positions = np.arange(0, len(places), every)
    total = inputs["input_ids"].shape[1]
    rows = places[torch.as_tensor(positions)] + total - text - 1  # a token is predicted at the position before it
    found: list[torch.Tensor] = []

    def note(layer: Any, args: tuple, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden[0, rows.to(hidden.device)])

    handles = [layer.register_forward_hook(note) for layer in backbone.layers]
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    kl = torch.empty(len(positions), len(found))
    for start in range(0, len(positions), CHUNK):
        part = slice(start, start + CHUNK)

        def logp(hidden: torch.Tensor, part: slice = part) -> torch.Tensor:
            states = norm(hidden[part].to(next(norm.parameters()).device))
            return head(states.to(head.weight.device, head.weight.dtype)).float().log_softmax(-1)

        final = logp(found[-1])
        for index, hidden in enumerate(found):
            kl[part, index] = (final.exp() * (final - logp(hidden))).sum(-1).clamp(min=0).cpu()
    return LensTrace(kl.numpy(), positions)
