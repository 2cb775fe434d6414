"""What a decoder must be given beside embeddings that hold images, where this VLM's forward did not make them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from keepsight.backbone.model import Backbone

#: By which a decoder takes visual features for layers behind the first (DeepStack).
_DEEP_FEATURES = "deepstack_visual_embeds"


def lacking_beside(
    backbone: Backbone, arguments: Mapping[str, Any], mask: torch.Tensor, given: Mapping[str, Any] | None = None
) -> list[str]:
    """What a call of the decoder lacks, where its embeddings hold images and were not made by this VLM's forward.

    Args:
        backbone: the model's parts.
        arguments: of the decoder's call, by name.
        mask: bool [B, T], where the images stand.
        given: the arguments of the VLM's call around it; None without one.

    Returns:
        Each as words: what it is, and how it can be given.
    """
    found = []
    if hasattr(backbone.vlm, "get_rope_index"):  # a place in its image for each visual token: time, height, width
        positions = arguments.get("position_ids")
        places = positions[-3:] if isinstance(positions, torch.Tensor) and positions.ndim == 3 else None
        if places is None or (places == places[:1]).all(0)[mask.expand(places.shape[1:])].all():
            found.append("the images' places in three dimensions (position_ids [3, B, T] of the VLM's get_rope_index)")
    name = backbone.family.sees_both_ways
    if name is not None and given is not None and given.get(name) is None:
        found.append(f"which tokens are an image's, which see each other both ways ({name})")
    takes = inspect.signature(type(backbone.decoder).forward).parameters
    if _DEEP_FEATURES in takes and arguments.get(_DEEP_FEATURES) is None:
        found.append(f"the features for its first layers (the decoder's own {_DEEP_FEATURES}, of its vision encoder)")
    return found
