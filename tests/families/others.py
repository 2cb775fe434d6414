"""Tiny random models of the families whose images come to the words in ways of their own."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.gemma import GEMMA4_TOKENS, placed
from families.parts import PLAIN_ROPE, TOKENS, decoder, four_each, merging, modality_types, moments, row, vit
from families.tiny import IMAGE, START, VIDEO, TinyFamily


def fuyu() -> Any:
    return transformers.FuyuConfig(
        text_config=decoder(model_type="persimmon", num_key_value_heads=4), patch_size=4, image_token_id=IMAGE
    )


def _flat(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Four patches, flat."""
    return {"pixel_values": torch.cat([draw(1, 4, 48) for _ in sizes])}


def fast_vlm() -> Any:
    """Its vision encoder is timm's; here another one that ends in a picture of features."""
    vision = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 32], "depths": [1, 1]}
    return transformers.FastVlmConfig(
        text_config=decoder(model_type="qwen2"),
        vision_config=vision | {"hidden_size": 32},
        image_token_index=IMAGE,
    )


def perception_lm() -> Any:
    """Its vision encoder is timm's; here another one with a class token."""
    return transformers.PerceptionLMConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("clip_vision_model", patch_size=8, model_args={"embed_dim": 32}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def _tile(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Pictures of one tile each."""
    return {"pixel_values": torch.cat([draw(1, 1, 3, 16, 16) for _ in sizes])}


def hyperclovax() -> Any:
    return transformers.HyperCLOVAXVisionV2Config(
        text_config=decoder(model_type="hyperclovax", head_dim=16, residual_multiplier=0.5, use_post_norm=True),
        vision_config=merging(model_type="qwen2_5_vl_vision", window_size=16, fullatt_block_indexes=[1]),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def lfm3_vl() -> Any:
    text = decoder(model_type="lfm3", head_dim=16, layer_types=["conv", "full_attention", "conv", "full_attention"])
    return transformers.Lfm3VlConfig(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": 4,
            "layer_types": ["conv", "full_attention"],
        },
        projector_hidden_size=48,
        **TOKENS,
    )


_VQ = {
    "embed_dim": 8,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "codebook_size": 8,
    "attn_resolutions": [],
}


def emu3() -> Any:
    names = {f"<|visual token {i:06d}|>": 100 + i for i in range(8)}
    return transformers.Emu3Config(
        text_config=decoder(attention_dropout=0.0),
        vq_config=_VQ | {"hidden_size": 32},
        vocabulary_map={"<image>": IMAGE, "<|extra_200|>": 110, **names},
    )


def _little(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.cat([draw(1, 3, 4, 4) for _ in sizes]),
        "image_sizes": torch.tensor([(4, 4)] * len(sizes)),
    }


def apertus() -> Any:
    return transformers.Apertus1p5Config(
        text_config=decoder(rope_parameters=PLAIN_ROPE),
        vision_config=_VQ | {"resolution": 4},
        audio_config={
            "model_type": "wavtokenizer_encoder",
            "codebook_size": 4,
            "hidden_size": 8,
            "codebook_dim": 8,
            "num_filters": 2,
            "upsampling_ratios": [2],
            "num_lstm_layers": 1,
        },
        image_token_id=IMAGE,
        audio_token_id=119,
        image_token_offset=100,
        audio_token_offset=108,
    )


def gemma4_unified() -> Any:
    return transformers.Gemma4UnifiedConfig(
        text_config=decoder(
            head_dim=16,
            global_head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        vision_config={
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 32,
            "mm_posemb_size": 16,
            "output_proj_dims": 32,
        },
        **GEMMA4_TOKENS,
    )


def molmo2() -> Any:
    vision = {k: v for k, v in vit(head_dim=16, num_key_value_heads=2).items() if k != "image_size"}
    return transformers.Molmo2Config(
        text_config=decoder(head_dim=16, additional_vocab_size=8),
        vision_config=vision | {"image_size": [16, 16]},
        adapter_config={
            "vision_feature_layer": [1, 0],
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "text_hidden_size": 64,
            "initializer_range": 0.3,
        },
        image_patch_id=IMAGE,
        image_start_token_id=START,
        low_res_image_start_token_id=118,
        image_end_token_id=123,
        frame_start_token_id=117,
        frame_end_token_id=116,
    )


_SAM = {
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 2,
    "global_attn_indexes": [0],
    "downsample_channels": [8, 32],
    "initializer_range": 0.02,
    "mlp_dim": 32,
}
_PAGES = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"] * 2,
    "num_key_value_heads": 4,
}


def deepseek_ocr2() -> Any:
    """Its vision encoder reads a page by 144 queries."""
    encoder = {
        k: v for k, v in vit(num_key_value_heads=2, vocab_size=8).items() if k not in ("image_size", "patch_size")
    }
    return transformers.DeepseekOcr2Config(
        text_config=decoder(**_PAGES),
        vision_config={"sam_config": _SAM | {"image_size": 64}, "encoder_config": encoder},
        image_token_id=IMAGE,
    )


def unlimited_ocr() -> Any:
    return transformers.UnlimitedOcrConfig(
        text_config=decoder(sliding_window=64, **_PAGES),
        vision_config={"sam_config": _SAM, "encoder_config": vit(image_size=8)},
        image_token_id=IMAGE,
    )


def _page(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    side = config.vision_config.sam_config.image_size
    return {"pixel_values": torch.cat([draw(1, 3, side, side) for _ in sizes])}


def _pooled(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Images of 4 x 4 patches, four of which are pooled into a token; numbers of patches count through the batch."""
    patches = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])
    return {
        "pixel_values": torch.cat([draw(1, 16, 48) for _ in sizes]),
        "image_token_pooling": torch.cat([patches + 16 * i for i in range(len(sizes))]),
        "image_grids": torch.tensor([(2, 2, 0, 0)] * len(sizes)),
        "image_num_crops": torch.ones(len(sizes), dtype=torch.long),
    }


def _each(tokens: int) -> Any:
    return lambda model, arguments: [tokens] * len(arguments["pixel_values"])


ROWS = [
    TinyFamily("fuyu", fuyu, "FuyuForCausalLM", _flat, marks=False, count=four_each, lacks=("copies",), since="5.24"),
    row("fast_vlm", fast_vlm, "FastVlm"),
    row("perception_lm", perception_lm, "PerceptionLM", _tile, count=four_each, since="5.24"),
    row("hyperclovax_vision_v2", hyperclovax, "HyperCLOVAXVisionV2", moments, marks=True, packed=True),
    row("lfm3_vl", lfm3_vl, "Lfm3Vl", moments, marks=True, packed=True, hybrid=True),
    row("emu3", emu3, "Emu3", _little, count=_each(6)),
    row("apertus1p5", apertus, "Apertus1p5", _little),
    row(
        "gemma4_unified",
        gemma4_unified,
        "Gemma4Unified",
        placed(2),
        marks=True,
        several=False,
        token_types=modality_types,
        lacks=("static cache",),
    ),
    row("molmo2", molmo2, "Molmo2", _pooled, counts_rows=True, token_types=modality_types, lacks=("turns",)),
    row("deepseek_ocr2", deepseek_ocr2, "DeepseekOcr2", _page, rounds=True),
    row("unlimited_ocr", unlimited_ocr, "UnlimitedOcr", _page, count=_each(7), rounds=True),
]
