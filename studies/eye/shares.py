"""Shares of answers that are right, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keepsight.lab.study.results import interval as interval_of_mean


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


@dataclass(frozen=True)
class Gap:
    """A mean paired difference over `seeds` seeds, and its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    def told(self, unit: str = "points", digits: int = 1) -> str:
        """In words: one seed is told as one."""
        often = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
        low, high = (f"{end:+.{digits}f}" for end in (self.low, self.high))
        return f"{self.mean:+.{digits}f} {unit} [{low}, {high}] ({often})"


def gap(these: Mapping[int, Sequence[float]], those: Mapping[int, Sequence[float]]) -> Gap | None:
    """How much `these` are above `those`, paired by seed and item (an image, a window of text).

    The interval is the wider one of two, both Student's t: over items, of their means over seeds, and (of two seeds or
    more) over seeds, of their means over items. So neither a lucky seed nor a lucky image makes a difference. Where one
    side has more items, its first ones are taken: the test begins with the same images for any number.

    Returns:
        None where no seed has both.
    """
    seeds = sorted(these.keys() & those.keys())
    if not seeds:
        return None
    gaps = [[one - other for one, other in zip(these[seed], those[seed], strict=False)] for seed in seeds]
    over = [interval_of_mean([sum(column) / len(column) for column in zip(*gaps, strict=False)])]
    if len(seeds) > 1:
        over.append(interval_of_mean([sum(row) / len(row) for row in gaps]))
    return Gap(over[0].mean, min(one.low for one in over), max(one.high for one in over), len(seeds))


def share(right: Mapping[int, str]) -> str:
    """In words: the mean share of "1" over seeds in percent, and its interval, the wider one of two as in `gap`."""
    counts = [bits.count("1") / len(bits) for bits in right.values()]
    mean, images = sum(counts) / len(counts), min(map(len, right.values()))
    low, high = interval(round(mean * images), images)
    if len(counts) > 1:
        over = interval_of_mean([100 * one for one in counts])
        low, high = max(0.0, min(low, over.low)), min(100.0, max(high, over.high))
    return f"{100 * mean:.0f} % [{low:.0f}, {high:.0f}]"
