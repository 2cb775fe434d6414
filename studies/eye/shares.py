"""Shares of answers that are right, and their intervals."""

from __future__ import annotations

import math


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent."""
    z, share = 1.96, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def difference(these: str, those: str) -> tuple[float, float, float]:
    """Points that `these` are above `those`, of the same images, and its 95 % interval (normal, paired)."""
    gaps = [100.0 * (int(one) - int(other)) for one, other in zip(these, those, strict=True)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1))
    half = 1.96 * spread / math.sqrt(len(gaps))
    return mean, mean - half, mean + half
