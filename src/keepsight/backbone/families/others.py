"""Families that share little with others."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

from keepsight.backbone.parts import IMAGES, Family, VisionParts
from keepsight.backbone.projecting import downsampled
from keepsight.backbone.towers import SIGLIP

_IDEFICS: dict[str, Any] = {
    "vision_tower": "vision_model",
    "projector": "connector",
    "visual_tokens": IMAGES,
    "merge_side": attrgetter("scale_factor"),
    "vision": replace(SIGLIP, padding="patch_attention_mask"),
}
# GLM marks the frames of a video with the images' token.
_GLM: dict[str, Any] = {
    "vision_tower": "visual",
    "projector": "visual.merger",
    "visual_tokens": (("image", "image_token_id"), ("video", "image_token_id")),
    "merge_side": attrgetter("vision_config.spatial_merge_size"),
    "vision": VisionParts(
        position_table="embeddings.position_embedding.weight", final_norm="post_layernorm", project=downsampled
    ),
}

_RESAMPLED = "its projector resamples a whole image into a fixed number of tokens, of which a memory's are none"
_PADDED = "its vision encoder takes images of any shape in ways that keepsight does not describe yet"

ROWS: dict[str, Family] = {
    "idefics3": Family(name="Idefics3", **_IDEFICS),
    "smolvlm": Family(name="SmolVLM", **_IDEFICS),
    "glm4v": Family(name="GLM-4.1V", **_GLM),
    "glm4v_moe": Family(name="GLM-4.5V", **_GLM),
    "glm46v": Family(name="GLM-4.6V", **_GLM),
    "ovis2": Family(
        name="Ovis2",
        projector="visual_embeddings_table",
        visual_tokens=IMAGES,
        no_vismem="its vision encoder ends in a softmax over visual words",
    ),
    "kimi_k25": Family(
        name="Kimi-K2.5",
        projector="mm_projector",
        no_vismem="its decoder's attention is latent (MLA), without the projections that the long-term memory adapts",
    ),
    "minicpmv4_6": Family(
        name="MiniCPM-V 4.6",
        projector="merger",
        no_vismem="its vision encoder merges patches between its blocks, where a memory's own positions have no place",
    ),
    "deepseek_vl": Family(
        name="DeepSeek-VL", vision_tower="vision_model", projector="aligner", visual_tokens=IMAGES, vision=SIGLIP
    ),
    "idefics2": Family(
        name="Idefics2",
        vision_tower="vision_model",
        projector="connector",
        visual_tokens=IMAGES,
        no_vismem=_RESAMPLED,
    ),
    "glm_ocr": Family(
        name="GLM-OCR",
        **_GLM
        | {"vision": VisionParts(final_norm="post_layernorm", project=downsampled, head_norms=("q_norm", "k_norm"))},
    ),
    "got_ocr2": Family(
        name="GOT-OCR 2.0",
        visual_tokens=IMAGES,
        no_vismem="its vision encoder's attention has relative positions, of which a memory's own positions have none",
    ),
    "lfm2_vl": Family(
        name="LFM2-VL", visual_tokens=IMAGES, merge_side=attrgetter("downsample_factor"), no_vismem=_PADDED
    ),
    "exaone4_5": Family(
        name="EXAONE 4.5",
        vision_tower="visual",
        projector="visual.merger",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        no_vismem="its vision encoder's heads share keys and values, which a memory's adapter does not know yet",
    ),
    "paddleocr_vl": Family(name="PaddleOCR-VL", vision_tower="visual", projector="projector", no_vismem=_PADDED),
}
