"""Tiny random models of every supported family, and inputs for them. One row of `FAMILIES` adds a family to all tests.

Run as a script, it prints every family's parameter count and visual tokens per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

VOCAB, PAD, EOS, IMAGE, VIDEO, START, END = 128, 0, 1, 120, 121, 122, 123
FIRST_WORD, LAST_WORD = 5, 115
#: Where tiny models live; their inputs follow them. `pytest --device cuda` changes it (conftest.py).
device = "cpu"


def _text(**more: Any) -> dict[str, Any]:
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


def _merging(**more: Any) -> dict[str, Any]:
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


_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "mrope_interleaved": True}


def qwen3_vl() -> Any:
    return transformers.Qwen3VLConfig(
        text_config=_text(head_dim=16, rope_parameters=_MROPE, attention_bias=False),
        vision_config=_merging(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **_TOKENS,
    )


def qwen3_vl_moe() -> Any:
    dense = qwen3_vl()
    return transformers.Qwen3VLMoeConfig(
        text_config=_text(
            head_dim=16,
            rope_parameters=_MROPE,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            decoder_sparse_step=1,
            mlp_only_layers=[3],
        ),
        vision_config=dense.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"},
        **_TOKENS,
    )


def qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        text_config=_text(
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        vision_config=_merging(window_size=16, fullatt_block_indexes=[1]),
        **_TOKENS,
    )


def qwen3_5() -> Any:
    return transformers.Qwen3_5Config(
        text_config=_text(
            head_dim=16,
            rope_parameters=_MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
        ),
        vision_config=_merging(num_position_embeddings=64),
        **_TOKENS,
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
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, **_TOKENS)


def _internvl(text: dict[str, Any]) -> Any:
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
    return _internvl(_text(model_type="qwen2"))


def internvl_qwen3() -> Any:
    return _internvl(_text(model_type="qwen3", head_dim=16))


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=_text(model_type="qwen2"),
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


def _qwen_images(config: Any, sizes: Sequence[tuple[int, int]], draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    side = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    grids = [(1, 2 * h, 2 * w) for h, w in sizes]
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    assert side == 8
    return {
        "pixel_values": torch.cat([draw(t * h * w, width) for t, h, w in grids]),
        "image_grid_thw": torch.tensor(grids),
    }


def _internvl_images(
    config: Any, sizes: Sequence[tuple[int, int]], draw: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    return {"pixel_values": torch.cat([draw(1, 3, 16, 16) for _ in sizes])}


def _llava_images(config: Any, sizes: Sequence[tuple[int, int]], draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([draw(3, 3, 12, 12) for _ in sizes]),
        "image_sizes": torch.tensor([(12, 12 * w) for _, w in sizes]),
    }


@dataclass(frozen=True)
class TinyFamily:
    """One row of the shared table.

    Attributes:
        name: id in test names.
        config: builds the tiny configuration.
        model_class: name of the class in transformers.
        images: (config, sizes in merged tokens, draw) -> pixel arguments.
        marks: whether images stand between start and end tokens (Qwen).
        hybrid: whether some layers have linear attention, whose state cannot be rewound.
        by_row: whether pixels come as [B, images, ...], with zeros for no image (Idefics).
        pixel_dim: along which images of pixel_values are put together.
        token_types: ids [B, T] -> further text arguments.
        packed: whether the pixels of all images lie in one sequence, without a repetition of the family's own.
        several: whether transformers repeats rows that have several images as they are, for beams and samples.
        counts_rows: whether transformers itself gives a row other positions beside other rows (HunYuan numbers the
            images of a whole batch).
        rounds: whether the base model rounds in another way under gradient checkpointing.
        lacks: what transformers itself does not do on it, with or without a memory: "copies" (several continuations of
            a prompt), "static cache", "turns" (a second image in a conversation, read behind a cache).
        since: the release of transformers from which on the family can carry a memory.
        count: (model, pixel arguments) -> visual tokens of each image; default: as the model makes them.
    """

    name: str
    config: Callable[[], Any]
    model_class: str
    images: Callable[..., dict[str, Any]] = _qwen_images
    marks: bool = True
    hybrid: bool = False
    by_row: bool = False
    pixel_dim: int = 0
    packed: bool = False
    several: bool = True
    token_types: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None
    count: Callable[..., list[int]] | None = None
    processor_kwargs: dict[str, Any] = field(default_factory=dict)
    counts_rows: bool = False
    rounds: bool = False
    lacks: tuple[str, ...] = ()
    since: str = "5.17"

    def skip_wrong_copies(self) -> None:
        """Skip what writes several continuations of a prompt where transformers itself gives them wrong pixels."""
        self.skip_lacking("copies")
        if self.packed and Version(transformers.__version__) < Version("5.20"):
            pytest.skip("transformers before 5.20 repeats packed pixels one by one, with or without a memory")

    def skip_lacking(self, what: str) -> None:
        """Skip what transformers itself does not do here."""
        if what in self.lacks:
            pytest.skip(f"transformers itself fails here, with or without a memory: {what}")

    def skip_rows_beside_others(self) -> None:
        """Skip what compares a row alone with the same row in a batch where the model itself tells them apart."""
        if self.counts_rows:
            pytest.skip("transformers numbers the images of a whole batch here, with or without a memory")

    def build(self, seed: int = 0, **overrides: Any) -> Any:
        """A tiny random model in eval mode, with embeddings of a size that lets images matter."""
        torch.manual_seed(seed)
        config = self.config()
        for key, value in overrides.items():
            setattr(config, key, value)
        model = getattr(transformers, self.model_class)(config).eval()
        if model.device.type != "meta":  # built on shapes alone, for a trace
            model = model.to(device)
        with torch.no_grad():
            for parameter in model.parameters():
                if (
                    parameter.ndim >= 2 and not parameter.is_meta and not parameter.any()
                ):  # Gemma 3 begins with a projector that sees nothing
                    parameter.normal_(std=0.1)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
        return model


FAMILIES = [
    TinyFamily("qwen3_vl", qwen3_vl, "Qwen3VLForConditionalGeneration"),
    TinyFamily("qwen3_vl_moe", qwen3_vl_moe, "Qwen3VLMoeForConditionalGeneration"),
    TinyFamily("qwen2_5_vl", qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration"),
    TinyFamily("qwen3_5", qwen3_5, "Qwen3_5ForConditionalGeneration", hybrid=True),
    TinyFamily("qwen3_5_moe", qwen3_5_moe, "Qwen3_5MoeForConditionalGeneration", hybrid=True),
    TinyFamily("internvl_qwen2", internvl_qwen2, "InternVLForConditionalGeneration", _internvl_images, marks=False),
    TinyFamily("internvl_qwen3", internvl_qwen3, "InternVLForConditionalGeneration", _internvl_images, marks=False),
    TinyFamily(
        "llava_onevision", llava_onevision, "LlavaOnevisionForConditionalGeneration", _llava_images, marks=False
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Row:
    """One sequence: text lengths and images in order, e.g. `Row(3, (2, 2), 4)`: 3 words, a 2x2-token image, 4 words.

    The same row always gets the same words and pixels, alone or in a batch.
    """

    segments: tuple[Any, ...]
    seed: int = 0

    def __init__(self, *segments: Any, seed: int = 0):
        object.__setattr__(self, "segments", segments)
        object.__setattr__(self, "seed", seed)

    @property
    def images(self) -> list[tuple[int, int]]:
        return [s for s in self.segments if isinstance(s, tuple)]


def make_inputs(family: TinyFamily, model: Any, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Model inputs for `rows`, left-padded to the longest: ids and mask [B, T], pixel arguments of the family."""
    config = model.config
    ids: list[list[int]] = []
    pixels: list[dict[str, torch.Tensor]] = []
    for row in rows:
        generator = torch.Generator().manual_seed(1000 + row.seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 2

        features: list[int] = []
        if row.images:
            arguments = family.images(config, row.images, draw)
            if family.images is _llava_images:
                arguments["batch_num_images"] = torch.tensor([len(row.images)])
            features = (family.count or count_visual_tokens)(model, arguments)
            pixels.append(arguments)
        tokens: list[int] = []
        for segment in row.segments:
            if isinstance(segment, int):
                tokens += torch.randint(FIRST_WORD, LAST_WORD, (segment,), generator=generator).tolist()
            else:
                image = [IMAGE] * features.pop(0)
                tokens += [START, *image, END] if family.marks else image
        ids.append(tokens)
    longest = max(map(len, ids))
    input_ids = torch.tensor([[PAD] * (longest - len(t)) + t for t in ids])
    attention_mask = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in ids])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family.images is _qwen_images:
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    if family.token_types is not None:
        inputs |= family.token_types(input_ids)
    for name in pixels[0] if pixels else ():
        inputs[name] = torch.cat([p[name] for p in pixels], family.pixel_dim if name == "pixel_values" else 0)
    if family.by_row and pixels:
        most = max(len(row.images) for row in rows)
        for name in pixels[0]:
            images = iter(inputs[name])
            inputs[name] = inputs[name].new_zeros(len(rows), most, *inputs[name].shape[1:])
            for i, row in enumerate(rows):
                for j in range(len(row.images)):
                    inputs[name][i, j] = next(images)
    if "batch_num_images" in inputs:
        inputs["batch_num_images"] = torch.tensor([len(row.images) for row in rows])
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def count_visual_tokens(model: Any, arguments: dict[str, torch.Tensor]) -> list[int]:
    """Visual tokens of each image, as the model itself makes them."""
    given = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in arguments.items()
    }
    output = model.get_image_features(**given, return_dict=True)
    return [image.flatten(0, -2).shape[0] for image in output.pooler_output]


if __name__ == "__main__":
    for family in FAMILIES:
        model = family.build()
        inputs = make_inputs(family, model, [Row(3, (1, 2), 2, (2, 2), 4)])
        out = model(**inputs)
        print(family.name, model.num_parameters(), inputs["input_ids"].tolist(), tuple(out.logits.shape))
