"""Qwen's VLMs: a vision encoder with axial rotary positions, patches merged two by two."""

from __future__ import annotations

from typing import Any

from keepsight.backbone.parts import Family, VisionParts

_STYLE: dict[str, Any] = {
    "vision_tower": "visual",
    "projector": "visual.merger",
    "merge_side": "vision_config.spatial_merge_size",
    "vision": VisionParts(position_table="pos_embed.weight"),
}
_NO_TABLE = _STYLE | {"vision": VisionParts()}

ROWS: dict[str, Family] = {
    "qwen3_vl": Family(name="Qwen3-VL", **_STYLE),
    "qwen3_vl_moe": Family(name="Qwen3-VL (mixture of experts)", **_STYLE),
    "qwen2_5_vl": Family(name="Qwen2.5-VL", **_NO_TABLE),
    "qwen3_5": Family(name="Qwen3.5", **_STYLE),
    "qwen3_5_moe": Family(name="Qwen3.5 (mixture of experts)", **_STYLE),
}
