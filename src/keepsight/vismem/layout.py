"""Where the short-term memory's positions lie: a strip under the image, or a coarse grid over it.

Coordinates are (row, column) in patches. Each of the N memories takes a square of s x s positions (s is what the
projector merges), row by row; the K queries lie in one row under the image in either layout.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def query_coordinates(num_queries: int, extent: tuple[int, int]) -> torch.Tensor:
    """Coordinates [K, 2]: one row, under the image."""
    columns = torch.arange(num_queries)
    return torch.stack([torch.full_like(columns, extent[0]), columns], -1)


def strip(num_memories: int, side: int, extent: tuple[int, int]) -> torch.Tensor:
    """Coordinates [N, s * s, 2] of a strip s rows high, under the row of queries."""
    return _squares(torch.zeros(num_memories, dtype=torch.long), torch.arange(num_memories), side) + torch.tensor(
        [extent[0] + 1, 0]
    )


def grid(num_memories: int, side: int, extent: tuple[int, int]) -> torch.Tensor:
    """Coordinates [N, s * s, 2] of squares spread evenly over the image, as near to its shape as N divides."""
    height, width = max(extent[0] // side, 1), max(extent[1] // side, 1)
    rows, columns = grid_shape(num_memories, height, width)
    row = ((torch.arange(rows) + 0.5) * height / rows).long()
    column = ((torch.arange(columns) + 0.5) * width / columns).long()
    return _squares(row.repeat_interleave(columns), column.repeat(rows), side)


def grid_shape(num_memories: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a grid of N, as near to the shape of an image of height x width as N divides."""
    rows = min(
        (n for n in range(1, num_memories + 1) if num_memories % n == 0),
        key=lambda n: abs(math.log(n * n / num_memories * width / height)),
    )
    return rows, num_memories // rows


def learned_positions(table: torch.Tensor, coordinates: torch.Tensor, extent: tuple[int, int]) -> torch.Tensor:
    """Learned positions at coordinates [..., 2] of an image of `extent`, from a square table [1, d, side, side].

    Returns:
        [..., d], bilinear.
    """
    size = torch.tensor(extent, device=table.device, dtype=torch.float32)
    centre = (coordinates.to(table.device).float() + 0.5) / size * 2 - 1
    points = centre.flip(-1).reshape(1, 1, -1, 2)  # grid_sample wants (x, y)
    sampled = F.grid_sample(table.float(), points, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled[0, :, 0].T.reshape(*coordinates.shape[:-1], -1).to(table.dtype)


def _squares(row: torch.Tensor, column: torch.Tensor, side: int) -> torch.Tensor:
    inner = torch.arange(side)
    offsets = torch.stack([inner.repeat_interleave(side), inner.repeat(side)], -1)
    return torch.stack([row, column], -1)[:, None] * side + offsets
