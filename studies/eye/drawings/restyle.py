"""Other drawing styles made from those there are: lines, flat colours, shades, other shapes of the same thing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from studies.eye.drawings.pictures import SIDE

_LUMA = (0.3, 0.59, 0.11)


def restyled(drawings: torch.Tensor, ink: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Each drawing with some of these, each drawn by itself: bent, thicker or thinner dark parts, few or other colours,
    inverted, shaded, outlined, lines alone, blurred, a part missing.

    Args:
        drawings: `[N, 64, 64, 4]` RGBA, uint8, colour not multiplied by alpha.
        ink: `[N]` bool: writing, which is only bent.
        draws: randomness.

    Returns:
        The same shape and type.
    """
    count = len(drawings)

    def chance(share: float) -> torch.Tensor:
        return ((torch.rand(count, generator=draws) < share) & ~ink).view(count, 1, 1, 1)

    def one(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *(shape or (1, 1, 1)), generator=draws) * (high - low) + low

    rgba = _bent(drawings.permute(0, 3, 1, 2).float() / 255, ink, draws)
    colour, alpha = rgba[:, :3], rgba[:, 3:]
    reach = int(torch.randint(1, 3, (1,), generator=draws))
    colour = torch.where(chance(0.12), -_largest(-colour, reach), colour)  # dark parts thicker
    colour = torch.where(chance(0.12), _largest(colour, reach), colour)  # or thinner
    levels = one(1.0, 3.0).round()
    colour = torch.where(chance(0.15), (colour * levels).round() / levels, colour)
    mixing = one(0, 1, 3, 3) ** 2
    mixed = torch.einsum("nij,njhw->nihw", mixing / mixing.sum(-1, keepdim=True), colour)
    colour = torch.where(chance(0.2), mixed, colour)
    light = (colour * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    tint = one(0, 1, 3, 1, 1)
    colour = torch.where(chance(0.15), light * tint + (1 - light) * one(0, 0.4, 3, 1, 1), colour)  # one colour's shades
    colour = torch.where(chance(0.1), 1 - colour, colour)
    along = torch.linspace(-1, 1, SIDE)
    angle = one(0, 6.2832)
    slope = angle.cos() * along.view(1, 1, 1, -1) + angle.sin() * along.view(1, 1, -1, 1)
    colour = torch.where(chance(0.3), colour + one(0.1, 0.35) * slope, colour).clamp(0, 1)
    edges = _edges(colour, alpha, reach)
    drawn = one(0, 0.25, 3, 1, 1) + chance(0.2) * 0.75
    outlined = colour * (1 - edges) + drawn * edges
    colour = torch.where(chance(0.15), outlined, colour)
    lines = chance(0.12)
    empty = chance(0.5).float()
    colour = torch.where(lines, drawn * edges + (1 - edges) * (1 - drawn.round()), colour)
    alpha = torch.where(lines, torch.maximum(edges, alpha * (1 - empty)), alpha)
    soft = _mean(torch.cat([colour * alpha, alpha], 1), reach)
    blurred = chance(0.15)
    colour = torch.where(blurred, soft[:, :3] / soft[:, 3:].clamp(min=1e-3), colour)
    alpha = torch.where(blurred, soft[:, 3:], alpha)
    far = (along.view(1, 1, 1, -1) - one(-0.7, 0.7)).abs().maximum((along.view(1, 1, -1, 1) - one(-0.7, 0.7)).abs())
    alpha = torch.where(chance(0.2) & (far < one(0.1, 0.35)), 0.0, alpha)
    made = torch.cat([colour, alpha], 1).clamp(0, 1)
    return (255 * made).round().to(torch.uint8).permute(0, 2, 3, 1)


def _bent(rgba: torch.Tensor, ink: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Half of them by a smooth random displacement: other proportions, as another hand would draw them."""
    count = len(rgba)
    strong = torch.where(ink, 0.03, 0.1) * (torch.rand(count, generator=draws) < 0.5)
    coarse = torch.randn(count, 2, 4, 4, generator=draws) * strong.view(count, 1, 1, 1)
    moved = F.interpolate(coarse, size=SIDE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).expand(count, -1, -1), [count, 1, SIDE, SIDE], align_corners=False)
    alpha = rgba[:, 3:]
    placed = F.grid_sample(torch.cat([rgba[:, :3] * alpha, alpha], 1), still + moved, align_corners=False)
    return torch.cat([placed[:, :3] / placed[:, 3:].clamp(min=1e-3), placed[:, 3:]], 1).clamp(0, 1)


def _edges(colour: torch.Tensor, alpha: torch.Tensor, reach: int) -> torch.Tensor:
    """`[N, 1, 64, 64]` in [0, 1]: where what is seen changes, and the rim of the drawing."""
    seen = torch.cat([colour * alpha, alpha], 1)
    change = (_largest(seen, reach) + _largest(-seen, reach)).amax(1, keepdim=True)
    return ((change - 0.25) * 4).clamp(0, 1)


def _largest(values: torch.Tensor, reach: int) -> torch.Tensor:
    """The largest of a square around each pixel, round the border; max pooling takes ten times as long on a CPU."""
    for axis in (-1, -2):
        near = [values.roll(shift, axis) for shift in range(-reach, reach + 1)]
        values = near[0]
        for one in near[1:]:
            values = torch.maximum(values, one)
    return values


def _mean(values: torch.Tensor, reach: int) -> torch.Tensor:
    for axis in (-1, -2):
        values = torch.stack([values.roll(shift, axis) for shift in range(-reach, reach + 1)]).mean(0)
    return values
