"""Tiny random models of further families: the rest of tests/more_families.py, which joins them to its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from families import _TOKENS, IMAGE, PAD, VIDEO, _internvl_images, _merging, _qwen_images, _text, internvl_qwen3
from tiny_parts import GLM_TOKENS, MROPE, four_each, modality_types, padded, row, sized, tiles, vit


def cohere2_vision() -> Any:
    return transformers.Cohere2VisionConfig(
        text_config=_text(
            model_type="cohere2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )


def vipllava() -> Any:
    return transformers.VipLlavaConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, 1],
    )


def llava_next_video() -> Any:
    return transformers.LlavaNextVideoConfig(
        text_config=_text(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16], [16, 32]],
    )


def idefics2() -> Any:
    return transformers.Idefics2Config(
        text_config=_text(model_type="mistral", head_dim=16),
        vision_config=vit(),
        perceiver_config={
            "hidden_size": 64,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


def glm_ocr() -> Any:
    return transformers.GlmOcrConfig(
        text_config=_text(head_dim=16, rope_parameters=MROPE | {"partial_rotary_factor": 1.0}),
        vision_config=_merging(),
        **GLM_TOKENS,
    )


def got_ocr2() -> Any:
    vision = vit(
        output_channels=16,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=48,
        image_size=32,
        initializer_range=0.02,
    )
    return transformers.GotOcr2Config(
        text_config=_text(model_type="qwen2"),
        vision_config=vision,
        image_token_index=IMAGE,
    )


def _got_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {"pixel_values": torch.cat([draw(1, 3, 32, 32) for _ in sizes])}


def lfm2_vl() -> Any:
    text = _text(model_type="lfm2", layer_types=["conv", "full_attention", "conv", "full_attention"])
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
    vision = _merging(num_key_value_heads=1, window_size=16, fullatt_block_indexes=[1])
    text = _text(model_type="exaone4", head_dim=16, layer_types=["full_attention"] * 4)
    return transformers.Exaone4_5_Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )


def _patches(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """As Qwen's; these models want no types of tokens."""
    return _qwen_images(config, sizes, draw)


def lighton_ocr() -> Any:
    return transformers.LightOnOcrConfig(
        text_config=_text(model_type="qwen3", head_dim=16),
        vision_config=vit("pixtral", head_dim=16),
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )


def qianfan_ocr() -> Any:
    dense = internvl_qwen3()
    vision = {k: v for k, v in dense.vision_config.to_dict().items() if k != "model_type"}
    return transformers.QianfanOCRConfig(
        text_config=dense.text_config.to_dict(),
        vision_config=vision | {"drop_path_rate": 0.0},
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def paddleocr_vl() -> Any:
    return transformers.PaddleOCRVLConfig(
        text_config=_text(head_dim=16, rope_parameters=MROPE),
        vision_config=vit(spatial_merge_size=2),
        **_TOKENS,
    )


def _paddle_images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.cat([draw(4 * h * w, 3, 4, 4) for h, w in sizes]),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]),
    }


ROWS = [
    row("cohere2_vision", cohere2_vision, "Cohere2Vision"),
    row("vipllava", vipllava, "VipLlava"),
    row("llava_next_video", llava_next_video, "LlavaNextVideo", tiles),
    row("idefics2", idefics2, "Idefics2", padded, by_row=True, count=four_each),
    row("glm_ocr", glm_ocr, "GlmOcr", _qwen_images, marks=True, several=False),
    row("got_ocr2", got_ocr2, "GotOcr2", _got_images),
    row("lfm2_vl", lfm2_vl, "Lfm2Vl", _lfm_images, hybrid=True, since="5.24"),
    row("exaone4_5", exaone4_5, "Exaone4_5_", _patches, marks=True, packed=True),
    row("lighton_ocr", lighton_ocr, "LightOnOcr", sized),
    row("qianfan_ocr", qianfan_ocr, "QianfanOCR", _internvl_images),
    row(
        "paddleocr_vl", paddleocr_vl, "PaddleOCRVL", _paddle_images, marks=True, packed=True, token_types=modality_types
    ),
]
