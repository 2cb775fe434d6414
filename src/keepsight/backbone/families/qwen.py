"""Qwen's VLMs: a vision encoder with axial rotary positions, patches merged two by two."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from keepsight.backbone.parts import Family, VisionParts

_STYLE: dict[str, Any] = {
    "vision_tower": "visual",
    "projector": "visual.merger",
    "merge_side": attrgetter("vision_config.spatial_merge_size"),
    "vision": VisionParts(position_table="pos_embed.weight"),
}
_NO_TABLE = _STYLE | {"vision": VisionParts()}
# Its configuration calls the decoder's width hidden_size.
_TWO = _STYLE | {"vision": VisionParts(width="embed_dim")}
# Its configuration names the placeholders in another way.
_OMNI = _STYLE | {
    "vision": VisionParts(qkv=("q", "k", "v")),
    "visual_tokens": (("image", "image_token_index"), ("video", "video_token_index")),
}

ROWS: dict[str, Family] = {
    "qwen3_vl": Family(name="Qwen3-VL", **_STYLE),
    "qwen3_vl_moe": Family(name="Qwen3-VL (mixture of experts)", **_STYLE),
    "cosmos3_omni": Family(name="Cosmos 3 (omni)", **_STYLE),
    "qwen2_5_vl": Family(name="Qwen2.5-VL", **_NO_TABLE),
    "qwen2_vl": Family(name="Qwen2-VL", **_TWO),
    "qwen2_5_omni_thinker": Family(name="Qwen2.5-Omni (thinker)", **_OMNI),
    "qwen3_omni_moe_thinker": Family(name="Qwen3-Omni (thinker)", **_STYLE),
    "qwen3_5": Family(name="Qwen3.5", **_STYLE),
    "qwen3_5_moe": Family(name="Qwen3.5 (mixture of experts)", **_STYLE),
}
