"""How a family's own projector is called on squares of positions that no image holds.

A short-term memory is formed on positions of its own in the vision encoder, and then goes the way that patches go: N
squares of s x s positions, row by row inside a square, become N positions of the decoder's width. Each function here
calls the model's own modules, in the shape in which that family's projector wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: (backbone, states [N, s * s, d] where the projector reads the encoder) -> [N, D].
Project = Callable[[Any, torch.Tensor], torch.Tensor]


def in_a_row(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The projector merges each s * s consecutive patches (Qwen)."""
    return backbone.projector(states.flatten(0, 1))


def merged(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The encoder's own last part merges each s * s consecutive patches, before the projector (HyperCLOVA X)."""
    return backbone.projector(backbone.vision_tower.merger(states.flatten(0, 1)))


def as_images(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The projector takes whole square images [N, patches, d]: each square is one (LLaVA, Aya, Idefics)."""
    return backbone.projector(states).flatten(0, -2)


def as_still_images(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The projector is told every image's grid [time, height, width] in patches (ERNIE)."""
    side = backbone.merge_side
    grids = torch.tensor([(1, side, side)] * len(states), device=states.device)
    return backbone.projector(states.flatten(0, 1), grids)


def shuffled(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The VLM packs the squares by its `pixel_shuffle` before the projector (InternVL)."""
    side = backbone.merge_side
    return backbone.projector(backbone.vlm.pixel_shuffle(states.unflatten(1, (side, side)), 1 / side)).flatten(0, -2)


def as_sized_images(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The projector is told every image's size in pixels (Mistral 3)."""
    pixels = backbone.merge_side * backbone.vision_tower.patch_size
    return backbone.projector(states.flatten(0, 1), [(pixels, pixels)] * len(states))


def on_full_images(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The projector pools images of one size only (Gemma 3): the squares are laid out on as many as they fill."""
    side, count = backbone.merge_side, len(states)
    across = backbone.projector.patches_per_image // side
    missing = -count % across**2
    squares = torch.cat([states, states.new_zeros(missing, *states.shape[1:])])
    images = squares.view(-1, across, across, side, side, states.shape[-1]).transpose(2, 3).flatten(1, 4)
    return backbone.projector(images).flatten(0, -2)[:count]


def downsampled(backbone: Any, states: torch.Tensor) -> torch.Tensor:
    """The encoder's last convolution merges the squares, before the projector (GLM)."""
    side, tower = backbone.merge_side, backbone.vision_tower
    squares = states.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return backbone.projector(tower.downsample(squares).flatten(1))
