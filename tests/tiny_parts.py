"""What the tiny models of several families are built of, and how their pictures look."""

from __future__ import annotations

from typing import Any

import torch
from families import IMAGE, START, VIDEO, TinyFamily

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


def squares(config: Any, sizes: Any, draw: Any) -> dict[str, Any]:
    """Square pictures, whatever sizes are asked for."""
    return {"pixel_values": torch.cat([draw(1, 3, 16, 16) for _ in sizes])}


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
