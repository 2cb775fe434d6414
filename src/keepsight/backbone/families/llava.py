"""A vision encoder of somebody else's, a projector, a language model: LLaVA and what was built like it."""

from __future__ import annotations

from typing import Any

from keepsight.backbone.parts import Family, VisionParts

_IMAGES = (("image", "image_token_id"),)
_STYLE: dict[str, Any] = {"vision_tower": "vision_tower", "projector": "multi_modal_projector"}

#: SigLIP, as transformers builds it; CLIP's blocks are the same.
SIGLIP = VisionParts(
    blocks="encoder.layers",
    norms=("layer_norm1", "layer_norm2"),
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    output="out_proj",
    rotary=None,
    position_table="embeddings.position_embedding.weight",
    final_norm="post_layernorm",
)

ROWS: dict[str, Family] = {
    "internvl": Family(
        name="InternVL",
        **_STYLE,
        visual_tokens=_IMAGES,
        merge_side="downsample_ratio",
        merge_side_is_ratio=True,
        vision=VisionParts(
            blocks="encoder.layer",
            norms=("layernorm_before", "layernorm_after"),
            attention="attention",
            scales=("lambda_1", "lambda_2"),
            qkv=("q_proj", "k_proj", "v_proj"),
            qk_norms=("q_norm", "k_norm"),
            output="projection_layer",
            rotary=None,
            position_table="embeddings.position_embeddings",
            class_token=True,
            final_norm="layernorm",
            shuffles=True,
        ),
    ),
    "llava_onevision": Family(name="LLaVA-OneVision", **_STYLE, vision=SIGLIP),
    "llava": Family(name="LLaVA, Pixtral", **_STYLE, visual_tokens=_IMAGES),
    "llava_next": Family(name="LLaVA-NeXT", **_STYLE, visual_tokens=_IMAGES),
    "mistral3": Family(name="Mistral 3", **_STYLE, visual_tokens=_IMAGES, merge_side="spatial_merge_size"),
    "aya_vision": Family(name="Aya Vision", **_STYLE, visual_tokens=_IMAGES, merge_side="downsample_factor"),
}
