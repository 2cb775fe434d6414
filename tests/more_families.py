"""Tiny random models of the families that the essential tests run on (tests/pvm/test_more_families.py)."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from families import (
    _TOKENS,
    IMAGE,
    PAD,
    START,
    VIDEO,
    VOCAB,
    _merging,
    _qwen_images,
    _text,
    qwen2_5_vl,
    qwen3_5,
    qwen3_vl_moe,
)
from final_families import ROWS as FINAL
from later_families import ROWS as LATER
from latest_families import ROWS as LATEST
from newest_families import ROWS as NEWEST
from packaging.version import Version
from tiny_parts import GLM_TOKENS, MROPE, four_each, modality_types, padded, row, sized, tiles, vit


def _omni_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """As Qwen's; these models want no types of tokens."""
    return _qwen_images(config, sizes, draw)


def _image_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (ids == IMAGE).int()}


def _prefix_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """PaliGemma reads its prompt in both directions."""
    return {"token_type_ids": torch.zeros_like(ids)}


def qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    return transformers.Qwen2VLConfig(
        text_config=_text(rope_parameters=MROPE),
        vision_config=vision | {"temporal_patch_size": 2, "mlp_ratio": 2},
        **_TOKENS,
    )


_AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "n_window": 4,
}


def qwen2_5_omni() -> Any:
    vision = {k: v for k, v in qwen2_5_vl().vision_config.to_dict().items() if k != "model_type"}
    text = _text(rope_parameters=MROPE)
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=_AUDIO | {"output_dim": 64},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=119,
        vision_start_token_id=START,
        pad_token_id=PAD,
    )


def qwen3_omni() -> Any:
    moe = qwen3_vl_moe()
    vision = {k: v for k, v in moe.vision_config.to_dict().items() if k != "model_type"}
    text = _text(
        head_dim=16,
        rope_parameters=MROPE | {"mrope_interleaved": True},
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=1,
        mlp_only_layers=[3],
    )
    return transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text,
        vision_config=vision,
        audio_config=_AUDIO | {"output_dim": 64, "downsample_hidden_size": 16},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=119,
        vision_start_token_id=START,
    )


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=_text(
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        ),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=119,
    )


def gemma4() -> Any:
    return transformers.Gemma4Config(
        text_config=_text(
            head_dim=16,
            global_head_dim=16,
            sliding_window=8,
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        ),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=119,
        boi_token_id=START,
        eoi_token_id=118,
        boa_token_id=117,
        eoa_token_index=116,
    )


def _gemma4_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    spots = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).flatten(0, 1)
    return {
        "pixel_values": torch.cat([draw(1, 16, 48) for _ in sizes]),
        "image_position_ids": spots[None].repeat(len(sizes), 1, 1),
    }


def paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=_text(model_type="gemma", head_dim=16),
        vision_config=vit("siglip_vision_model", vision_use_head=False, projection_dim=64),
        projection_dim=64,
        hidden_size=64,
        image_token_index=IMAGE,
        vocab_size=VOCAB,
    )


def pixtral() -> Any:
    return transformers.LlavaConfig(
        text_config=_text(model_type="mistral", head_dim=16),
        vision_config=vit("pixtral", head_dim=16),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
    )


def llava_next() -> Any:
    return transformers.LlavaNextConfig(
        text_config=_text(model_type="mistral", sliding_window=64),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16], [16, 32]],
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config=_text(model_type="mistral", head_dim=16),
        vision_config=vit("pixtral", head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def aya_vision() -> Any:
    return transformers.AyaVisionConfig(
        text_config=_text(
            model_type="cohere2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
    )


def idefics3() -> Any:
    return transformers.Idefics3Config(
        text_config=_text(model_type="llama"),
        vision_config=vit("idefics3_vision"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


def smolvlm() -> Any:
    return transformers.SmolVLMConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("smolvlm_vision"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


def _glm_vision() -> dict[str, Any]:
    return _merging(image_size=16)


def glm4v() -> Any:
    return transformers.Glm4vConfig(
        text_config=_text(rope_parameters=MROPE | {"partial_rotary_factor": 1.0}),
        vision_config=_glm_vision(),
        **GLM_TOKENS,
    )


def glm46v() -> Any:
    return transformers.Glm46VConfig(
        text_config=glm4v().text_config.to_dict(), vision_config=glm4v().vision_config.to_dict(), **GLM_TOKENS
    )


def glm4v_moe() -> Any:
    text = _text(
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


def ovis2() -> Any:
    vision = vit("ovis2_vision", vocab_size=32, num_visual_indicator_tokens=5)
    return transformers.Ovis2Config(
        text_config=_text(model_type="qwen2"),
        vision_config={k: v for k, v in vision.items() if k != "model_type"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[115, 116, 117, 118, 119],
        hidden_size=64,
        vocab_size=VOCAB,
    )


def kimi() -> Any:
    text = _text(
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
    return transformers.Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=32, **_TOKENS)


def _kimi_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.cat([draw(4 * h * w, 3, 4, 4) for h, w in sizes]),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]),
    }


def deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
    )


def minicpmv() -> Any:
    text = qwen3_5().text_config.to_dict()
    return transformers.MiniCPMV4_6Config(
        text_config=text,
        vision_config=vit(image_size=32),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        insert_layer_id=0,
    )


def _minicpm_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.cat([draw(1, 3, 4, 64) for _ in sizes], -1),
        "target_sizes": torch.tensor([(4, 4)] * len(sizes)),
    }


ROWS = [
    row("qwen2_vl", qwen2_vl, "Qwen2VL", _qwen_images, marks=True),
    row("qwen2_5_omni_thinker", qwen2_5_omni, "Qwen2_5OmniThinker", _omni_images, marks=True, packed=True),
    row("qwen3_omni_moe_thinker", qwen3_omni, "Qwen3OmniMoeThinker", _omni_images, marks=True, packed=True),
    row("gemma3", gemma3, "Gemma3", token_types=_image_types, marks=True, several=False),
    row("gemma4", gemma4, "Gemma4", _gemma4_images, token_types=modality_types, marks=True, several=False),
    row("paligemma", paligemma, "PaliGemma", token_types=_prefix_types),
    row("llava", llava, "Llava"),
    row("pixtral", pixtral, "Llava", sized),
    row("llava_next", llava_next, "LlavaNext", tiles),
    row("mistral3", mistral3, "Mistral3", sized),
    row("aya_vision", aya_vision, "AyaVision"),
    row("idefics3", idefics3, "Idefics3", padded, by_row=True, count=four_each),
    row("smolvlm", smolvlm, "SmolVLM", padded, by_row=True, count=four_each),
    row("glm4v", glm4v, "Glm4v", _qwen_images, marks=True, several=False),
    row("glm4v_moe", glm4v_moe, "Glm4vMoe", _qwen_images, marks=True, several=False),
    row("glm46v", glm46v, "Glm46V", _qwen_images, marks=True, several=False),
    row("ovis2", ovis2, "Ovis2"),
    row("kimi_k25", kimi, "Kimi_K25", _kimi_images, marks=True, packed=True),
    row("minicpmv4_6", minicpmv, "MiniCPMV4_6", _minicpm_images, hybrid=True, pixel_dim=-1, packed=True),
    row("deepseek_vl", deepseek_vl, "DeepseekVL", count=lambda model, given: [16] * len(given["pixel_values"])),
    *NEWEST,
    *LATER,
    *LATEST,
    *FINAL,
]

#: Those that this release of transformers has: the oldest supported ones lack the newest families.
MORE = [
    tiny
    for tiny in ROWS
    if hasattr(transformers, tiny.model_class) and Version(transformers.__version__) >= Version(tiny.since)
]
