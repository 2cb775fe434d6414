"""Draws what the eye is shown: pictures on coloured paper, singly or in a grid, and written words and numbers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from studies.eye.drawings.pictures import SIDE

COLOURS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.08, 0.08, 0.08),
    "red": (0.88, 0.12, 0.12),
    "green": (0.15, 0.62, 0.2),
    "blue": (0.15, 0.3, 0.9),
    "yellow": (0.97, 0.9, 0.15),
    "orange": (0.97, 0.55, 0.1),
    "purple": (0.52, 0.2, 0.65),
}
"""Of the paper behind a picture."""

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold")
HELD_OUT_FONT = "DejaVuSerif-Italic"


@lru_cache(maxsize=4096)
def written(text: str, font: str) -> torch.Tensor:
    """`[64, 64]` uint8: the ink of a word or number as large as fits."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    size = 40
    while True:
        face = ImageFont.truetype(str(file), size)
        left, top, right, bottom = face.getbbox(text)
        if right - left <= SIDE - 6:
            break
        size -= 2
    page = Image.new("L", (SIDE, SIDE))
    place = ((SIDE - right - left) / 2, (SIDE - bottom - top) / 2)
    ImageDraw.Draw(page).text(place, text, fill=255, font=face)
    return torch.from_numpy(np.asarray(page).copy())


def another_colour(paper: int, draws: torch.Generator) -> torch.Tensor:
    """`[3]` uint8: any colour that can be told from a paper's."""
    behind = torch.tensor(list(COLOURS.values())[paper])
    while True:
        colour = torch.rand(3, generator=draws)
        if (colour - behind).abs().max() > 0.4:
            return (255 * colour).to(torch.uint8)


def draw(
    drawings: torch.Tensor, ink: torch.Tensor, papers: torch.Tensor, cell: int, vary: float, draws: torch.Generator
) -> torch.Tensor:
    """Cells as the eye sees them: turned, moved and recoloured a little, on their paper.

    Args:
        drawings: `[N, 64, 64, 4]` RGBA, uint8.
        ink: `[N]` bool: writing, which is never mirrored and is black, or white on dark paper.
        papers: `[N]` numbers of `COLOURS`.
        cell: side of a cell in pixels.
        vary: 0 draws as it is, 1 as in training.
        draws: randomness.

    Returns:
        `[N, 3, cell, cell]` float32 in [0, 1].
    """
    count = len(drawings)

    def one(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *(shape or (1, 1, 1)), generator=draws) * (high - low) + low

    rgba = drawings.permute(0, 3, 1, 2).float() / 255
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    paper = torch.tensor(list(COLOURS.values()))[papers].view(count, 3, 1, 1)
    dark = (paper.mean(1, keepdim=True) < 0.45).float()
    still = ink.view(count, 1, 1, 1).float()
    # the drawing's own colours
    grey = colour.mean(1, keepdim=True)
    rich = 1 + vary * one(-0.9, 0.3)
    colour = grey + (colour - grey) * rich.clamp(min=0.05)
    colour = (colour - 0.5) * (1 + vary * one(-0.4, 0.4)) + 0.5
    colour = colour * (1 + vary * one(-0.25, 0.25, 3, 1, 1)) + vary * one(-0.1, 0.1)
    swapped = torch.rand(count, generator=draws) < 0.3 * vary  # another hue for some
    colour = torch.where(swapped.view(count, 1, 1, 1), colour.roll(1, 1), colour)
    colour = torch.where(still > 0, dark.expand_as(colour), colour).clamp(0, 1)
    # where it stands
    calm = 1 - 0.7 * still.view(count)
    turn = vary * calm * one(-0.35, 0.35, 1).view(count)
    scale = 1 / (0.95 + vary * calm * one(-0.3, 0.12, 1).view(count))
    stretch = 1 + vary * calm * one(-0.15, 0.15, 1).view(count)
    shear = vary * calm * one(-0.2, 0.2, 1).view(count)
    across, down = (vary * calm * one(-0.15, 0.15, 1).view(count) for _ in range(2))
    mirror = torch.where((torch.rand(count, generator=draws) < 0.5 * vary) & ~ink, -1.0, 1.0)
    rows = [
        torch.stack([mirror * scale * turn.cos() * stretch, -scale * turn.sin() + shear, across], 1),
        torch.stack([mirror * scale * turn.sin(), scale * turn.cos() / stretch, down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [count, 4, cell, cell], align_corners=False)
    placed = F.grid_sample(torch.cat([colour * alpha, alpha], 1), grid, align_corners=False)
    # the grid samples a picture that is larger than the cell; a small blur stands in for a proper reduction
    paper = (paper * (1 - 0.12 * vary * one(0, 1)) + 0.06 * vary * one(-1, 1, 3, 1, 1)).clamp(0, 1)
    seen = placed[:, :3] + paper * (1 - placed[:, 3:])
    blurred = F.avg_pool2d(F.pad(seen, (1, 1, 1, 1), mode="replicate"), 3, 1)
    soft = vary * (torch.rand(count, 1, 1, 1, generator=draws) < 0.3).float() * one(0, 1)
    return seen + (blurred - seen) * soft


def arrange(cells: torch.Tensor, side: int) -> torch.Tensor:
    """`[B * side * side, 3, c, c]`, row by row -> images `[B, 3, side * c, side * c]`, with lines between."""
    cells = cells.clone()
    cells[:, :, 0], cells[:, :, -1] = 0.5, 0.5
    cells[:, :, :, 0], cells[:, :, :, -1] = 0.5, 0.5
    _, channels, cell, _ = cells.shape
    laid = cells.view(-1, side, side, channels, cell, cell).permute(0, 3, 1, 4, 2, 5)
    return laid.reshape(-1, channels, side * cell, side * cell)


def patches(images: torch.Tensor, patch: int, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images as Qwen2.5-VL's tower takes them: patches in the order of its merger.

    Args:
        images: `[B, 3, S, S]` in [0, 1].
        patch, merge: as in the tower's configuration (temporal patches of 1).

    Returns:
        `[B * n * n, 3 * patch * patch]` and grids `[B, 3]`, with n = S / patch.
    """
    batch, channels, side, _ = images.shape
    along = side // patch
    laid = (images.float() - 0.5) / 0.25
    laid = laid.view(batch, channels, along // merge, merge, patch, along // merge, merge, patch)
    rows = laid.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch * along * along, channels * patch * patch)
    return rows, torch.tensor([[1, along, along]] * batch)
