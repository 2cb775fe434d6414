"""Families that share little with others, whose images come cut into patches."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.first import qwen3_5
from families.parts import (
    GLM_TOKENS,
    MROPE,
    PLAIN_ROPE,
    TOKENS,
    decoder,
    merging,
    modality_types,
    moments,
    row,
    still,
    unflattened,
    vit,
)
from families.tiny import IMAGE, VIDEO


def _glm_vision() -> dict[str, Any]:
    return merging(image_size=16)


def glm4v() -> Any:
    return transformers.Glm4vConfig(
        text_config=decoder(rope_parameters=MROPE | {"partial_rotary_factor": 1.0}),
        vision_config=_glm_vision(),
        **GLM_TOKENS,
    )


def glm46v() -> Any:
    return transformers.Glm46VConfig(
        text_config=glm4v().text_config.to_dict(), vision_config=glm4v().vision_config.to_dict(), **GLM_TOKENS
    )


def glm4v_moe() -> Any:
    text = decoder(
        head_dim=16,
        rope_parameters=MROPE | {"partial_rotary_factor": 1.0},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    )
    return transformers.Glm4vMoeConfig(text_config=text, vision_config=_glm_vision(), **GLM_TOKENS)


def glm_ocr() -> Any:
    return transformers.GlmOcrConfig(
        text_config=decoder(head_dim=16, rope_parameters=MROPE | {"partial_rotary_factor": 1.0}),
        vision_config=merging(),
        **GLM_TOKENS,
    )


def glmga() -> Any:
    dense = glm4v()
    return transformers.GlmgaConfig(
        text_config=dense.text_config.to_dict(), vision_config=dense.vision_config.to_dict(), **GLM_TOKENS
    )


def kimi() -> Any:
    text = decoder(
        model_type="deepseek_v3",
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    )
    vision = {
        "patch_size": 4,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
    }
    return transformers.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=32, **TOKENS)


def minicpmv() -> Any:
    text = qwen3_5().text_config.to_dict()
    return transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config=vit(image_size=32),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        insert_layer_id=0,
    )


def minicpm_ocr() -> Any:
    tiny = minicpmv()
    vision = {k: v for k, v in tiny.vision_config.to_dict().items() if k != "model_type"}
    return transformers.MiniCPMOcrConfig(
        text_config=tiny.text_config.to_dict(),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        insert_layer_id=0,
    )


def _strips(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Patches in one strip."""
    return {
        "pixel_values": torch.cat([draw(1, 3, 4, 64) for _ in sizes], -1),
        "target_sizes": torch.tensor([(4, 4)] * len(sizes)),
    }


def lfm2_vl() -> Any:
    text = decoder(model_type="lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"])
    return transformers.Lfm2VlConfig(
        text_config=text | {"block_auto_adjust_ff_dim": False},
        vision_config=vit("siglip2_vision_model", vision_use_head=False, num_patches=16),
        image_token_id=IMAGE,
        projector_hidden_size=64,
    )


def _lfm_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Patches of pictures of their own sizes, padded to as many as an image can have."""
    valid = torch.tensor([[i < 4 * h * w for i in range(16)] for h, w in sizes])
    return {
        "pixel_values": torch.cat([draw(1, 16, 48) for _ in sizes]),
        "spatial_shapes": torch.tensor([(2 * h, 2 * w) for h, w in sizes]),
        "pixel_attention_mask": valid.long(),
    }


def exaone4_5() -> Any:
    vision = merging(num_key_value_heads=1, window_size=16, fullatt_block_indexes=[1])
    text = decoder(model_type="exaone4", head_dim=16, layer_types=["full_attention"] * 4)
    return transformers.Exaone4_5_Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )


def paddleocr_vl() -> Any:
    return transformers.PaddleOCRVLConfig(
        text_config=decoder(head_dim=16, rope_parameters=MROPE),
        vision_config=vit(spatial_merge_size=2),
        **TOKENS,
    )


def video_llama_3() -> Any:
    return transformers.VideoLlama3Config(
        text_config=decoder(model_type="qwen2"),
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
    text = decoder(
        rope_parameters=PLAIN_ROPE | {"mrope_section": [3, 3, 2]},
        moe_intermediate_size=[32, 16],
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        tie_word_embeddings=False,
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4}
    return transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision, **GLM_TOKENS)


def hunyuan_vl() -> Any:
    vision = vit(max_image_size=32, out_hidden_size=64, text_hidden_size=64)
    rope = PLAIN_ROPE | {"mrope_section": [2, 2, 2, 2]}
    return transformers.HunYuanVLConfig(
        text_config=decoder(head_dim=16, rope_parameters=rope),
        vision_config={k: v for k, v in vision.items() if k != "image_size"},
        image_token_id=IMAGE,
    )


def cosmos3_edge() -> Any:
    return transformers.Cosmos3EdgeConfig(
        text_config=decoder(head_dim=16, rope_parameters=MROPE | {"mrope_section": [3, 3, 2]}),
        vision_config={k: v for k, v in vit(num_patches=16).items() if k != "image_size"},
        projector_hidden_size=48,
        **TOKENS,
    )


def muse_glimmer() -> Any:
    text = decoder(
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=PLAIN_ROPE,
        layer_rope_theta=[10000.0, 0] * 2,
    )
    vision = vit(pos_emb_height=4, pos_emb_width=4, layer_types=["window_attention", "full_attention"])
    return transformers.MuseGlimmerConfig(
        text_config=text,
        vision_config={k: v for k, v in vision.items() if k != "image_size"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        out_hidden_size=128,
        projector_hidden_size=48,
    )


def muse_spark() -> Any:
    tiny = muse_glimmer()
    text = {k: v for k, v in tiny.text_config.to_dict().items() if k not in ("model_type", "hidden_activation")}
    vision = {k: v for k, v in tiny.vision_config.to_dict().items() if k != "model_type"}
    return transformers.MuseSparkConfig(
        text_config=text
        | {"moe_intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 32},
        vision_config=vision,
        audio_config={"patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "num_hidden_layers": 1}
        | {"out_hidden_size": 64},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=119,
        out_hidden_size=128,
        projector_hidden_size=48,
    )


def cohere_compass() -> Any:
    text = decoder(
        layer_types=["full_attention"] * 4,
        rope_parameters={"full_attention": MROPE | {"mrope_interleaved": True}},
        num_key_value_heads=2,
    )
    return transformers.CohereCompassConfig(
        text_config=text,
        vision_config=merging(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **TOKENS,
    )


def minimax() -> Any:
    text = decoder(
        head_dim=16,
        rotary_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        mlp_layer_types=["dense", "sparse"] * 2,
    )
    return transformers.MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vit(),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=48,
    )


def dots3_note() -> Any:
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 16}
    text = decoder(
        **heads,
        qk_rope_head_dim=8,
        head_dim=16,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_experts_intermediate_size=32,
        layer_types=["full_attention"] * 4,
        use_dsa=False,
        use_sliding_window=False,
    )
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    audio = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Dots3NoteConfig(
        text_config=text,
        vision_config=vision
        | {"patch_size": 4, "mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 32, "adapter_out_dim": 64},
        audio_config=audio
        | {"adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 8, "feature_size": 8},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=119,
    )


def _merged(model: Any, arguments: dict[str, Any]) -> list[int]:
    return (arguments["image_grid_thw"].prod(-1) // 4).tolist()


_GLM: dict[str, Any] = {"images": moments, "marks": True, "several": False, "token_types": modality_types}
STRIP: dict[str, Any] = {"images": _strips, "hybrid": True, "pixel_dim": -1, "packed": True}


ROWS = [
    row("glm4v", glm4v, "Glm4v", **_GLM),
    row("glm46v", glm46v, "Glm46V", **_GLM),
    row("glm4v_moe", glm4v_moe, "Glm4vMoe", **_GLM),
    row("glm_ocr", glm_ocr, "GlmOcr", **_GLM),
    row("glmga", glmga, "Glm46V", **_GLM),
    row("kimi_k25", kimi, "Kimi_K25", unflattened, marks=True, packed=True),
    row("minicpmv4_6", minicpmv, "MiniCPMV4_6", **STRIP),
    row("minicpm_ocr", minicpm_ocr, "MiniCPMOcr", **STRIP),
    row("lfm2_vl", lfm2_vl, "Lfm2Vl", _lfm_images, hybrid=True, since="5.24"),
    row("exaone4_5", exaone4_5, "Exaone4_5_", moments, marks=True, packed=True),
    row("paddleocr_vl", paddleocr_vl, "PaddleOCRVL", unflattened, marks=True, packed=True, token_types=modality_types),
    row("video_llama_3", video_llama_3, "VideoLlama3", _merge_told, packed=True),
    row("ernie4_5_vl_moe", ernie, "Ernie4_5_VLMoe", still, marks=True, packed=True, token_types=modality_types),
    row(
        "hunyuan_vl",
        hunyuan_vl,
        "HunYuanVL",
        still,
        packed=True,
        token_types=modality_types,
        counts_rows=True,
        since="5.24",
    ),
    row("cosmos3_edge", cosmos3_edge, "Cosmos3Edge", still, marks=True, packed=True, token_types=modality_types),
    row("muse_glimmer", muse_glimmer, "MuseGlimmer", moments, marks=True, packed=True),
    row("muse_spark", muse_spark, "MuseSpark", moments, marks=True, packed=True),
    row("cohere_compass", cohere_compass, "CohereCompass", moments, marks=True, token_types=modality_types),
    row("minimax_m3_vl", minimax, "MiniMaxM3Sparse", moments, marks=True, packed=True, since="5.24"),
    row("dots3_note", dots3_note, "Dots3Note", still, packed=True, count=_merged),
]
