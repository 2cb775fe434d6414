"""Means of paired differences with bootstrap intervals: the one statistic that the battery reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 4000
#: How many units are held in memory at once: 16 MB of choices, and as much of values, however many units there are.
_CHOSEN = 2_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over n units.

    Attributes:
        value: the mean.
        low, high: percentile bootstrap interval over units; equal to `value` for a single unit.
        n: units.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(values: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of values [n], resampled over n."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    random, at_once = np.random.default_rng(seed), max(1, _CHOSEN // len(values))
    sizes = [min(at_once, DRAWS - start) for start in range(0, DRAWS, at_once)]
    means = [values[random.integers(0, len(values), (rows, len(values)))].mean(1) for rows in sizes]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))


def strata(lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows from the shortest to the longest in `count` groups, or fewer, since those of one length stay together.

    Args:
        lengths: of each row, `[n]`, at least one.
        count: how many groups, as even as that allows.

    Returns:
        Indices of each group's rows.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    cuts = [part[0] for part in np.array_split(np.arange(len(order)), count)[1:] if len(part)]
    return np.split(order, sorted({int(np.searchsorted(ordered, ordered[cut])) for cut in cuts} - {0}))
