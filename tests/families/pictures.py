"""Families that share little with others, whose images come as whole pictures."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.parts import PLAIN_ROPE, decoder, four_each, padded, row, squares, squares_of, vit
from families.tiny import IMAGE, PAD, VOCAB


def idefics2() -> Any:
    return transformers.Idefics2Config(
        text_config=decoder(model_type="mistral", head_dim=16),
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


def idefics3() -> Any:
    return transformers.Idefics3Config(
        text_config=decoder(model_type="llama"),
        vision_config=vit("idefics3_vision"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


def smolvlm() -> Any:
    return transformers.SmolVLMConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("smolvlm_vision"),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )


def granite_docling() -> Any:
    return transformers.GraniteDoclingConfig(
        text_config=decoder(),
        vision_config=vit(out_hidden_size=64, scale_factor=2, deepstack_visual_indexes=[0], use_fine_route=False),
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


def _masked_tiles(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return squares(config, sizes, draw) | {"pixel_attention_mask": torch.ones(len(sizes), dtype=torch.bool)}


def ovis2() -> Any:
    vision = vit("ovis2_vision", vocab_size=32, num_visual_indicator_tokens=5)
    return transformers.Ovis2Config(
        text_config=decoder(model_type="qwen2"),
        vision_config={k: v for k, v in vision.items() if k != "model_type"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[115, 116, 117, 118, 119],
        hidden_size=64,
        vocab_size=VOCAB,
    )


def deepseek_vl() -> Any:
    return transformers.DeepseekVLConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        image_token_id=IMAGE,
    )


def deepseek_vl_hybrid() -> Any:
    high = vit("sam_vision_model", output_channels=8, window_size=2, global_attn_indexes=[0], mlp_dim=48)
    return transformers.DeepseekVLHybridConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit("siglip_vision_model", vision_use_head=False, image_size=8),
        high_res_vision_config=high | {"initializer_range": 0.02},
        image_token_id=IMAGE,
    )


def _two_resolutions(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.cat([draw(1, 3, 8, 8) for _ in sizes]),
        "high_res_pixel_values": torch.cat([draw(1, 3, 16, 16) for _ in sizes]),
    }


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
        text_config=decoder(model_type="qwen2"),
        vision_config=vision,
        image_token_index=IMAGE,
    )


def pp_chart2table() -> Any:
    tiny = got_ocr2()
    return transformers.PPChart2TableConfig(
        text_config=tiny.text_config.to_dict(), vision_config=tiny.vision_config.to_dict(), image_token_index=IMAGE
    )


def aria() -> Any:
    return transformers.AriaConfig(
        text_config=decoder(head_dim=16, moe_num_experts=4, moe_topk=2, intermediate_size=32),
        vision_config=vit("idefics3_vision"),
        projector_patch_to_query_dict={16: 4},
        image_token_index=IMAGE,
    )


def janus() -> Any:
    vq = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1]}
    return transformers.JanusConfig(
        text_config=decoder(model_type="llama"),
        vision_config=vit(image_size=8, mlp_ratio=2, projection_dim=64, num_image_tokens=4),
        vq_config=vq | {"num_res_blocks": 1, "projection_dim": 64, "image_token_embed_dim": 64},
        image_token_id=IMAGE,
    )


def step3p7() -> Any:
    text = decoder(
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


ROWS = [
    row("idefics2", idefics2, "Idefics2", padded, by_row=True, count=four_each),
    row("idefics3", idefics3, "Idefics3", padded, by_row=True, count=four_each),
    row("smolvlm", smolvlm, "SmolVLM", padded, by_row=True, count=four_each),
    row("granite_docling", granite_docling, "GraniteDocling", _masked_tiles, by_row=True, count=four_each),
    row("ovis2", ovis2, "Ovis2"),
    row("deepseek_vl", deepseek_vl, "DeepseekVL", count=lambda model, given: [16] * len(given["pixel_values"])),
    row("deepseek_vl_hybrid", deepseek_vl_hybrid, "DeepseekVLHybrid", _two_resolutions, count=four_each, rounds=True),
    row("got_ocr2", got_ocr2, "GotOcr2", squares_of(32)),
    row("pp_chart2table", pp_chart2table, "GotOcr2", squares_of(32)),
    row("aria", aria, "Aria", since="5.24"),
    row("janus", janus, "Janus", squares_of(8), count=four_each),
    row("step3p7", step3p7, "Step3p7"),
]
