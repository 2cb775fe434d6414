"""What a tiny random family is, and inputs for one."""

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
    images: Callable[..., dict[str, Any]]
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
