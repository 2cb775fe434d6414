"""Google's VLMs."""

from __future__ import annotations

from keepsight.backbone.parts import Family

_IMAGES = (("image", "image_token_id"),)

ROWS: dict[str, Family] = {
    "gemma3": Family(
        name="Gemma 3", vision_tower="vision_tower", projector="multi_modal_projector", visual_tokens=_IMAGES
    ),
    "gemma4": Family(name="Gemma 4", vision_tower="vision_tower", projector="embed_vision"),
    "paligemma": Family(
        name="PaliGemma", vision_tower="vision_tower", projector="multi_modal_projector", visual_tokens=_IMAGES
    ),
}
