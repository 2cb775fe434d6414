"""Google's VLMs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from keepsight.backbone.parts import IMAGES, Family
from keepsight.backbone.projecting import on_full_images
from keepsight.backbone.towers import SIGLIP


def _pooled_side(config: Any) -> int:
    """Gemma 3 is told how many tokens an image is, and pools accordingly."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size // int(config.mm_tokens_per_image**0.5))


_GEMMA3: dict[str, Any] = {
    "visual_tokens": IMAGES,
    "merge_side": _pooled_side,
    "vision": replace(SIGLIP, project=on_full_images),
    "sees_both_ways": "token_type_ids",
}

ROWS: dict[str, Family] = {
    "gemma3": Family(name="Gemma 3", **_GEMMA3),
    "shieldgemma2": Family(name="ShieldGemma 2", **_GEMMA3),
    "gemma4": Family(
        name="Gemma 4",
        projector="embed_vision",
        no_vismem=(
            "its vision encoder has norms behind its branches and on its values, and pools patches by their places: "
            "a memory does not describe that yet"
        ),
    ),
    "gemma4_unified": Family(
        name="Gemma 4 (unified)",
        vision_tower="embed_vision",
        projector="embed_vision",
        no_vismem="it has no vision encoder: patches enter its language model through a projection",
    ),
    "paligemma": Family(
        name="PaliGemma",
        visual_tokens=IMAGES,
        vision=SIGLIP,
        text_type=1,
    ),
}
