"""The sizes of released models, as transformers configurations: for benchmarks and recipes on machines without weights.

`python benchmarks/shared/shapes.py` prints the parameters of each; a test compares them with the published counts.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

IMAGE, VIDEO, START, END = 151655, 151656, 151652, 151653  # of the released Qwen-VL tokenizers
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_SMALL = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}


def qwen3_vl(
    width: int, ffn: int, vision: tuple[int, int, int], deepstack: list[int], tied: bool, **text: Any
) -> transformers.Qwen3VLConfig:
    """A Qwen3-VL; `vision` is (depth, width, inner width)."""
    depth, vision_width, vision_ffn = vision
    sizes = {
        "vocab_size": 151936,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
    } | text
    head = sizes["head_dim"]
    section = [24, 20, 20] if head == 128 else [head // 2 - 2 * (head // 6), head // 6, head // 6]
    return transformers.Qwen3VLConfig(
        text_config=sizes
        | {
            "hidden_size": width,
            "intermediate_size": ffn,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "tie_word_embeddings": tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": section,
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_ffn,
            "num_heads": 16 if vision_width >= 1024 else 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": width,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deepstack,
        },
        tie_word_embeddings=tied,
        **(_TOKENS if sizes["vocab_size"] > IMAGE else _SMALL),
    )


def qwen2_5_vl(
    width: int, ffn: int, heads: tuple[int, int], vision: tuple[int, int, int], full: list[int], **text: Any
) -> transformers.Qwen2_5_VLConfig:
    """A Qwen2.5-VL; `heads` is (query heads, KV heads), `vision` is (depth, width, inner width)."""
    depth, vision_width, vision_ffn = vision
    head = width // heads[0]
    section = [16, 24, 24] if head == 128 else [head // 8, head // 16 * 3, head // 2 - head // 8 - head // 16 * 3]
    sizes = {"vocab_size": 152064, "num_hidden_layers": 28, "max_position_embeddings": 128000} | text
    return transformers.Qwen2_5_VLConfig(
        text_config=sizes
        | {
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_ffn,
            "num_heads": 16 if vision_width >= 1024 else 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": width,
            "fullatt_block_indexes": full,
        },
        tie_word_embeddings=False,
        **(_TOKENS if sizes["vocab_size"] > IMAGE else _SMALL),
    )


_TINY = {"vocab_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def build_config(name: str) -> Any:
    """The configuration called `name`: a released model's, "tiny-qwen3-vl" or "tiny-qwen2.5-vl" (ours)."""
    if name == "Qwen/Qwen3-VL-4B-Instruct":
        return qwen3_vl(2560, 9728, (24, 1024, 4096), [5, 11, 17], tied=True)
    if name == "Qwen/Qwen3-VL-8B-Instruct":
        return qwen3_vl(4096, 12288, (27, 1152, 4304), [8, 16, 24], tied=False)
    if name == "Qwen/Qwen2.5-VL-7B-Instruct":
        return qwen2_5_vl(3584, 18944, (28, 4), (32, 1280, 3420), [7, 15, 23, 31])
    if name == "tiny-qwen3-vl":
        return qwen3_vl(256, 768, (4, 128, 344), [0, 1, 2], tied=True, **_TINY)
    if name == "tiny-qwen2.5-vl":
        return qwen2_5_vl(256, 704, (4, 2), (4, 128, 344), [1, 3], vocab_size=4096, num_hidden_layers=8)
    raise ValueError(f"no shape {name!r}; known: {', '.join(NAMES)}")


NAMES = (
    "Qwen/Qwen3-VL-4B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "tiny-qwen3-vl",
    "tiny-qwen2.5-vl",
)


def count(name: str) -> tuple[int, int]:
    """(all parameters, those of the vision encoder), counted on the meta device."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(build_config(name))
    return tuple(sum(p.numel() for p in module.parameters()) for module in (model, model.model.visual))


if __name__ == "__main__":
    for name in NAMES:
        whole, vision = count(name)
        print(f"{name:30} {whole:>14,} parameters, {vision:>12,} of them in the vision encoder")
