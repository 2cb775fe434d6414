"""Tiny random models of the families that came last of all: the fourth part of tests/more_families.py."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from families import _TOKENS, IMAGE, START, VIDEO, _merging, _qwen_images, _text, qwen3_vl
from later_families import _spatial
from tiny_parts import MROPE, PLAIN_ROPE, modality_types, row, sized, vit


def minicpm_ocr() -> Any:
    from more_families import minicpmv

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


def cosmos3_omni() -> Any:
    tiny = qwen3_vl()
    return transformers.Cosmos3OmniConfig(
        text_config=tiny.text_config.to_dict(), vision_config=tiny.vision_config.to_dict(), **_TOKENS
    )


def cosmos3_edge() -> Any:
    return transformers.Cosmos3EdgeConfig(
        text_config=_text(head_dim=16, rope_parameters=MROPE | {"mrope_section": [3, 3, 2]}),
        vision_config={k: v for k, v in vit(num_patches=16).items() if k != "image_size"},
        projector_hidden_size=48,
        **_TOKENS,
    )


def muse_glimmer() -> Any:
    text = _text(
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


def _moments(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Patches of two moments each, as Qwen's; these models want no types of tokens."""
    return {
        "pixel_values": torch.cat([draw(4 * h * w, 96) for h, w in sizes]),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]),
    }


def shieldgemma2() -> Any:
    from more_families import gemma3

    tiny = gemma3()
    return transformers.ShieldGemma2Config(
        text_config=tiny.text_config.to_dict(),
        vision_config=tiny.vision_config.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=119,
    )


def _image_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (ids == IMAGE).int()}


def mistral_large4() -> Any:
    text = _text(
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_key_value_heads=4,
        index_topk=64,
        index_head_dim=16,
        index_n_heads=2,
        rope_parameters=PLAIN_ROPE,
    )
    return transformers.MistralLarge4Config(
        text_config=text, vision_config=vit("pixtral", head_dim=16), image_token_index=IMAGE, spatial_merge_size=2
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
    text = _text(
        layer_types=["full_attention"] * 4,
        rope_parameters={"full_attention": MROPE | {"mrope_interleaved": True}},
        num_key_value_heads=2,
    )
    return transformers.CohereCompassConfig(
        text_config=text,
        vision_config=_merging(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **_TOKENS,
    )


def minimax() -> Any:
    text = _text(
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
    text = _text(
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


_STRIP = {"hybrid": True, "pixel_dim": -1, "packed": True}
_GEMMA = {"marks": True, "several": False}

ROWS = [
    row("minicpm_ocr", minicpm_ocr, "MiniCPMOcr", _strips, **_STRIP),
    row("cosmos3_omni", cosmos3_omni, "Cosmos3Omni", _qwen_images, marks=True),
    row("cosmos3_edge", cosmos3_edge, "Cosmos3Edge", _spatial, marks=True, packed=True, token_types=modality_types),
    row("muse_glimmer", muse_glimmer, "MuseGlimmer", _moments, marks=True, packed=True),
    row("shieldgemma2", shieldgemma2, "Gemma3", token_types=_image_types, **_GEMMA),
    row("mistral_large4", mistral_large4, "MistralLarge4", sized),
    row("muse_spark", muse_spark, "MuseSpark", _moments, marks=True, packed=True),
    row("cohere_compass", cohere_compass, "CohereCompass", _qwen_images, marks=True),
    row("minimax_m3_vl", minimax, "MiniMaxM3Sparse", _moments, marks=True, packed=True, since="5.24"),
    row("dots3_note", dots3_note, "Dots3Note", _spatial, packed=True, count=_merged),
]
