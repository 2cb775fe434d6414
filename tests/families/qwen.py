"""Further VLMs of Qwen's, and what is built like them."""

from __future__ import annotations

from typing import Any

import transformers

from families.first import qwen2_5_vl, qwen3_vl, qwen3_vl_moe
from families.parts import MROPE, TOKENS, decoder, modality_types, moments, row
from families.tiny import IMAGE, PAD, START, VIDEO


def qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    return transformers.Qwen2VLConfig(
        text_config=decoder(rope_parameters=MROPE),
        vision_config=vision | {"temporal_patch_size": 2, "mlp_ratio": 2},
        **TOKENS,
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
    text = decoder(rope_parameters=MROPE)
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
    text = decoder(
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


def cosmos3_omni() -> Any:
    tiny = qwen3_vl()
    return transformers.Cosmos3OmniConfig(
        text_config=tiny.text_config.to_dict(), vision_config=tiny.vision_config.to_dict(), **TOKENS
    )


ROWS = [
    row("qwen2_vl", qwen2_vl, "Qwen2VL", moments, marks=True, token_types=modality_types),
    row("qwen2_5_omni_thinker", qwen2_5_omni, "Qwen2_5OmniThinker", moments, marks=True, packed=True),
    row("qwen3_omni_moe_thinker", qwen3_omni, "Qwen3OmniMoeThinker", moments, marks=True, packed=True),
    row("cosmos3_omni", cosmos3_omni, "Cosmos3Omni", moments, marks=True, token_types=modality_types),
]
