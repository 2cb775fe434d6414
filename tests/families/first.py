"""The families that go through everything: whole training runs and servers besides the essential tests."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.parts import TOKENS, decoder, merging, modality_types, moments, row
from families.tiny import IMAGE, VIDEO

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}


def qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config=decoder(head_dim=16, rope_parameters=_MROPE, attention_bias=False),
        vision_config=merging(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **TOKENS,
    )


def qwen3_vl_moe() -> Any:
    dense = qwen3_vl()
    return transformers.Qwen3VLMoeConfig(
        text_config=decoder(
            head_dim=16,
            rope_parameters=_MROPE,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=1,
            mlp_only_layers=[3],
        ),
        vision_config=dense.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"},
        **TOKENS,
    )


def qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=decoder(
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        vision_config=merging(window_size=16, fullatt_block_indexes=[1]),
        **TOKENS,
    )


def qwen3_5() -> Any:
    return transformers.Qwen3_5Config(
        text_config=decoder(
            head_dim=16,
            rope_parameters=_MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
        ),
        vision_config=merging(num_position_embeddings=64),
        **TOKENS,
    )


def qwen3_5_moe() -> Any:
    dense = qwen3_5()
    text = dense.text_config.to_dict() | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_hidden_layers": 4,
    }
    text.pop("model_type")
    vision = dense.vision_config.to_dict()
    vision.pop("model_type")
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, **TOKENS)


def internvl(text: dict[str, Any]) -> Any:
    return transformers.InternVLConfig(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def internvl_qwen2() -> Any:
    return internvl(decoder(model_type="qwen2"))


def internvl_qwen3() -> Any:
    return internvl(decoder(model_type="qwen3", head_dim=16))


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=decoder(model_type="qwen2"),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 12,
            "patch_size": 4,
            "vision_use_head": False,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[12, 12], [12, 24]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _tiles(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """One tile and the whole of each image, as where a row has several images."""
    return {
        "pixel_values": torch.stack([draw(3, 3, 12, 12) for _ in sizes]),
        "image_sizes": torch.tensor([(12, 12 * w) for _, w in sizes]),
        "batch_num_images": torch.tensor([len(sizes)]),
    }


_QWEN: dict[str, Any] = {"images": moments, "marks": True, "token_types": modality_types}

FAMILIES = [
    row("qwen3_vl", qwen3_vl, "Qwen3VL", **_QWEN),
    row("qwen3_vl_moe", qwen3_vl_moe, "Qwen3VLMoe", **_QWEN),
    row("qwen2_5_vl", qwen2_5_vl, "Qwen2_5_VL", **_QWEN),
    row("qwen3_5", qwen3_5, "Qwen3_5", hybrid=True, **_QWEN),
    row("qwen3_5_moe", qwen3_5_moe, "Qwen3_5Moe", hybrid=True, **_QWEN),
    row("internvl_qwen2", internvl_qwen2, "InternVL"),
    row("internvl_qwen3", internvl_qwen3, "InternVL"),
    row("llava_onevision", llava_onevision, "LlavaOnevision", _tiles),
]
