"""Google's VLMs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from families.parts import decoder, image_types, modality_types, row, vit
from families.tiny import IMAGE, START, VIDEO, VOCAB

GEMMA4_TOKENS: dict[str, Any] = {
    "audio_config": None,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": 119,
    "boi_token_id": START,
    "eoi_token_id": 118,
    "boa_token_id": 117,
    "eoa_token_index": 116,
}


def _prefix_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """PaliGemma reads its prompt in both directions."""
    return {"token_type_ids": torch.zeros_like(ids)}


def gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=decoder(
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


def shieldgemma2() -> Any:
    tiny = gemma3()
    return transformers.ShieldGemma2Config(
        text_config=tiny.text_config.to_dict(),
        vision_config=tiny.vision_config.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=119,
    )


def gemma4() -> Any:
    return transformers.Gemma4Config(
        text_config=decoder(
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
        **GEMMA4_TOKENS,
    )


def placed(side: int) -> Any:
    """Images of side * side patches, each with its column and row."""

    def images(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
        spots = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).flatten(0, 1)
        return {
            "pixel_values": torch.cat([draw(1, side**2, 48) for _ in sizes]),
            "image_position_ids": spots[None].repeat(len(sizes), 1, 1),
        }

    return images


def paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        text_config=decoder(model_type="gemma", head_dim=16),
        vision_config=vit("siglip_vision_model", vision_use_head=False, projection_dim=64),
        projection_dim=64,
        hidden_size=64,
        image_token_index=IMAGE,
        vocab_size=VOCAB,
    )


_GEMMA = {"marks": True, "several": False}


ROWS = [
    row("gemma3", gemma3, "Gemma3", token_types=image_types, marks=True, several=False),
    row("shieldgemma2", shieldgemma2, "Gemma3", token_types=image_types, **_GEMMA),
    row("gemma4", gemma4, "Gemma4", placed(4), token_types=modality_types, marks=True, several=False),
    row("paligemma", paligemma, "PaliGemma", token_types=_prefix_types),
]
