"""Vision encoders that several families share."""

from __future__ import annotations

from dataclasses import replace

from keepsight.backbone.parts import VisionParts
from keepsight.backbone.projecting import as_images

#: SigLIP, read by the projector behind its last norm.
SIGLIP = VisionParts(
    blocks="encoder.layers",
    norms=("layer_norm1", "layer_norm2"),
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    output="out_proj",
    rotary=None,
    position_table="embeddings.position_embedding.weight",
    raster=True,
    final_norm="post_layernorm",
    project=as_images,
)
#: SigLIP, read before it: what a VLM gets that takes the hidden states of a layer, be it the last one.
SIGLIP_LAYERS = replace(SIGLIP, final_norm=None)
#: CLIP, whose last norm is for its own pooled output alone.
CLIP_LAYERS = replace(SIGLIP_LAYERS, class_token=True)
PIXTRAL = VisionParts(
    blocks="transformer.layers",
    norms=("attention_norm", "ffn_norm"),
    attention="attention",
    mlp="feed_forward",
    qkv=("q_proj", "k_proj", "v_proj"),
    output="o_proj",
    rotary="patch_positional_embedding",
    raster=True,
    project=as_images,
)
