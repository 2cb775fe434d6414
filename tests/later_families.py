"""Tiny random models of the families that came last: the third part of tests/more_families.py, which joins them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from families import IMAGE, PAD, VIDEO, _qwen_images, _text
from tiny_parts import GLM_TOKENS, PLAIN_ROPE, four_each, modality_types, row, squares, vit


def aria() -> Any:
    return transformers.AriaConfig(
        text_config=_text(head_dim=16, moe_num_experts=4, moe_topk=2, intermediate_size=32),
        vision_config=vit("idefics3_vision"),
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )


def janus() -> Any:
    vq = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1]}
    return transformers.JanusConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit(image_size=8, mlp_ratio=2, projection_dim=64, num_image_tokens=4),
        vq_config=vq | {"num_res_blocks": 1, "projection_dim": 64, "image_token_embed_dim": 64},
        image_token_id=IMAGE,
    )


def _small(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {"pixel_values": torch.cat([draw(1, 3, 8, 8) for _ in sizes])}


def video_llama_3() -> Any:
    return transformers.VideoLlama3Config(
        text_config=_text(model_type="qwen2"),
        vision_config=vit(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _merge_told(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Patches, and how many of them per side the encoder makes one of."""
    return {
        "pixel_values": torch.cat([draw(h * w, 48) for h, w in sizes]),
        "image_grid_thw": torch.tensor([(1, h, w) for h, w in sizes]),
        "image_merge_sizes": torch.ones(len(sizes), dtype=torch.long),
    }


def ernie() -> Any:
    """Its processor also says which experts a token goes to; transformers does not lengthen that without a cache."""
    text = _text(
        rope_parameters=PLAIN_ROPE | {"mrope_section": [3, 3, 2]},
        moe_intermediate_size=[32, 16],
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        tie_word_embeddings=False,
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    return transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **GLM_TOKENS)


def _spatial(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Patches of one moment each."""
    return {
        "pixel_values": torch.cat([draw(4 * h * w, 48) for h, w in sizes]),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]),
    }


def deepseek_vl_hybrid() -> Any:
    high = vit("sam_vision_model", output_channels=8, window_size=2, global_attn_indexes=[0], mlp_dim=48)
    return transformers.DeepseekVLHybridConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("siglip_vision_model", vision_use_head=False, image_size=8),
        high_res_vision_config=high | {"initializer_range": 0.02},
        image_token_id=IMAGE,
    )


def _two_resolutions(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.cat([draw(1, 3, 8, 8) for _ in sizes]),
        "high_res_pixel_values": torch.cat([draw(1, 3, 16, 16) for _ in sizes]),
    }


def video_llava() -> Any:
    return transformers.VideoLlavaConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


def granite_docling() -> Any:
    return transformers.GraniteDoclingConfig(
        text_config=_text(),
        vision_config=vit(out_hidden_size=64, scale_factor=2, deepstack_visual_indexes=[0], use_fine_route=False),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


def _masked_tiles(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return squares(config, sizes, draw) | {"pixel_attention_mask": torch.ones(len(sizes), dtype=torch.bool)}


def glmga() -> Any:
    from more_families import glm4v

    dense = glm4v()
    return transformers.GlmgaConfig(
        text_config=dense.text_config.to_dict(), vision_config=dense.vision_config.to_dict(), **GLM_TOKENS
    )


def hunyuan_vl() -> Any:
    vision = vit(max_image_size=32, out_hidden_size=64, text_hidden_size=64)
    rope = PLAIN_ROPE | {"mrope_section": [2, 2, 2, 2]}
    return transformers.HunYuanVLConfig(
        text_config=_text(head_dim=16, rope_parameters=rope),
        vision_config={k: v for k, v in vision.items() if k != "image_size"},
        image_token_id=IMAGE,
    )


def step3p7() -> Any:
    text = _text(
        head_dim=16,
        share_expert_dim=32,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=8,
        rope_parameters={"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE},
    )
    return transformers.Step3p7Config(text_config=text, vision_config=vit(mlp_ratio=1.5), image_token_id=IMAGE)


def pp_chart2table() -> Any:
    from newest_families import got_ocr2

    tiny = got_ocr2()
    return transformers.PPChart2TableConfig(
        text_config=tiny.text_config.to_dict(), vision_config=tiny.vision_config.to_dict(), image_token_index=IMAGE
    )


def _large(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {"pixel_values": torch.cat([draw(1, 3, 32, 32) for _ in sizes])}


ROWS = [
    row("aria", aria, "Aria", since="5.24"),
    row("janus", janus, "Janus", _small, count=four_each),
    row("video_llama_3", video_llama_3, "VideoLlama3", _merge_told, packed=True),
    row("ernie4_5_vl_moe", ernie, "Ernie4_5_VLMoe", _spatial, marks=True, packed=True, token_types=modality_types),
    row("deepseek_vl_hybrid", deepseek_vl_hybrid, "DeepseekVLHybrid", _two_resolutions, count=four_each, rounds=True),
    row("video_llava", video_llava, "VideoLlava", since="5.24"),
    row("granite_docling", granite_docling, "GraniteDocling", _masked_tiles, by_row=True, count=four_each),
    row("glmga", glmga, "Glm46V", _qwen_images, marks=True, several=False),
    row(
        "hunyuan_vl",
        hunyuan_vl,
        "HunYuanVL",
        _spatial,
        packed=True,
        token_types=modality_types,
        counts_rows=True,
        since="5.24",
    ),
    row("step3p7", step3p7, "Step3p7"),
    row("pp_chart2table", pp_chart2table, "GotOcr2", _large),
]
