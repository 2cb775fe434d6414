"""A vision encoder of somebody else's, a projector, a language model."""

from __future__ import annotations

from typing import Any

import transformers

from families.first import internvl_qwen3
from families.parts import PLAIN_ROPE, decoder, row, sized, tiles, vit
from families.tiny import IMAGE, VIDEO


def pixtral() -> Any:
    return transformers.LlavaConfig(
        text_config=decoder(model_type="mistral", head_dim=16),
        vision_config=vit("pixtral", head_dim=16),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def llava() -> Any:
    return transformers.LlavaConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
    )


def llava_next() -> Any:
    return transformers.LlavaNextConfig(
        text_config=decoder(model_type="mistral", sliding_window=64),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 16], [16, 32]],
    )


def llava_next_video() -> Any:
    return transformers.LlavaNextVideoConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 16], [16, 32]],
    )


def vipllava() -> Any:
    return transformers.VipLlavaConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, 1],
    )


def mistral3() -> Any:
    return transformers.Mistral3Config(
        text_config=decoder(model_type="mistral", head_dim=16),
        vision_config=vit("pixtral", head_dim=16),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )


def mistral_large4() -> Any:
    text = decoder(
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


def aya_vision() -> Any:
    return transformers.AyaVisionConfig(
        text_config=decoder(
            model_type="cohere2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        image_token_index=IMAGE,
    )


def cohere2_vision() -> Any:
    return transformers.Cohere2VisionConfig(
        text_config=decoder(
            model_type="cohere2", sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )


def lighton_ocr() -> Any:
    return transformers.LightOnOcrConfig(
        text_config=decoder(model_type="qwen3", head_dim=16),
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


def video_llava() -> Any:
    return transformers.VideoLlavaConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("clip_vision_model", num_hidden_layers=3, patch_size=8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )


ROWS = [
    row("llava", llava, "Llava"),
    row("pixtral", pixtral, "Llava", sized),
    row("llava_next", llava_next, "LlavaNext", tiles),
    row("llava_next_video", llava_next_video, "LlavaNextVideo", tiles),
    row("vipllava", vipllava, "VipLlava"),
    row("mistral3", mistral3, "Mistral3", sized),
    row("mistral_large4", mistral_large4, "MistralLarge4", sized),
    row("aya_vision", aya_vision, "AyaVision"),
    row("cohere2_vision", cohere2_vision, "Cohere2Vision"),
    row("lighton_ocr", lighton_ocr, "LightOnOcr", sized),
    row("qianfan_ocr", qianfan_ocr, "QianfanOCR"),
    row("video_llava", video_llava, "VideoLlava", since="5.24"),
]
