"""What the tiny models of several families are built of, and how their pictures look."""

from __future__ import annotations

from typing import Any

import torch

from families.tiny import END, EOS, IMAGE, PAD, START, VIDEO, VOCAB, TinyFamily


def decoder(**more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": 2,
    }
    return sizes | more


def merging(**more: Any) -> dict[str, Any]:
    """A vision encoder as Qwen's and GLM's, whose merger makes one token of 2 x 2 patches."""
    sizes = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 64,
    }
    return sizes | more


TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


MROPE = PLAIN_ROPE | {"mrope_section": [2, 3, 3]}


def vit(model_type: str | None = None, **more: Any) -> dict[str, Any]:
    """Without a `model_type` where a family's own config class knows it."""
    named = {"model_type": model_type} if model_type else {}
    return (
        named
        | {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        }
        | more
    )


GLM_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": 123,
    "video_start_token_id": 118,
    "video_end_token_id": 117,
}


def squares_of(side: int) -> Any:
    """Square pictures, whatever sizes are asked for."""
    return lambda config, sizes, draw: {"pixel_values": torch.cat([draw(1, 3, side, side) for _ in sizes])}


squares = squares_of(16)


def patches_of(*shape: int) -> Any:
    """Patches, four to a visual token, and how many there are in time, height and width."""
    return lambda config, sizes, draw: {
        "pixel_values": torch.cat([draw(4 * h * w, *shape) for h, w in sizes]),
        "image_grid_thw": torch.tensor([(1, 2 * h, 2 * w) for h, w in sizes]),
    }


#: Of two moments each, as Qwen's; of one; as small pictures.
moments, still, unflattened = patches_of(96), patches_of(48), patches_of(3, 4, 4)


def sized(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Pictures of their own sizes, in the corner of a canvas."""
    return squares(config, sizes, draw) | {"image_sizes": torch.tensor([(8 * h, 8 * w) for h, w in sizes])}


def padded(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """The same, and a mask that says where they are."""
    given = squares(config, sizes, draw)
    given["pixel_attention_mask"] = torch.zeros(len(sizes), 16, 16, dtype=torch.long)
    for mask, (h, w) in zip(given["pixel_attention_mask"], sizes, strict=True):
        mask[: 8 * h, : 8 * w] = 1
    return given


def tiles(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Two tiles of a low picture, three of a high one."""
    return {
        "pixel_values": torch.stack([draw(3, 3, 16, 16) for _ in sizes]),
        "image_sizes": torch.tensor([(16, 16 * h) for h, _ in sizes]),
    }


def four_each(model: Any, arguments: dict[str, Any]) -> list[int]:
    return [4] * len(arguments["pixel_values"])


def row(name: str, config: Any, model_class: str, images: Any = squares, **more: Any) -> TinyFamily:
    return TinyFamily(name, config, f"{model_class}ForConditionalGeneration", images, **({"marks": False} | more))


def modality_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


def image_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"token_type_ids": (ids == IMAGE).int()}
