"""Means of paired differences with bootstrap intervals: the one statistic that the battery reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DRAWS = 4000


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
    draws = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high), len(values))
