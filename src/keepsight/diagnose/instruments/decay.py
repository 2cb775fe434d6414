"""Fit the decay of visual attention: a power law with its interval, and a saturation level.

With n text keys in sight, a head whose text keeps a mean relevance mu gives the image Omega_V <= beta / (beta + mu n):
on log axes a slope between 0 and -1 (paper 2605.00814, section 2). The fit is made on log-spaced bins of n, so that
the many late positions do not outvote the few early ones, and its interval comes from resampling bins and rows, because
neighbouring positions are no independent measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from keepsight.diagnose.instruments.attention import AttentionTrace

BINS = 24
DRAWS = 2000
FLATTER_BY = 6.0  # how much BIC must fall before a saturation level is believed


@dataclass(frozen=True)
class DecayFit:
    """Omega_V ~ text_tokens ** slope.

    Attributes:
        slope: exponent of the power law; -1 is the paper's worst case, 0 no decay.
        low, high: its 95 % interval.
        intercept: log Omega_V at one text token, by the line.
        saturation: level at which the mass stops falling, or None if a plain power law explains the data as well.
        points: log-spaced bins that the line was fitted to.
        first, last: text tokens at the first and last bin.
    """

    slope: float
    low: float
    high: float
    intercept: float
    saturation: float | None
    points: int
    first: float
    last: float

    @property
    def falls(self) -> bool:
        """The slope is negative and its interval excludes 0."""
        return self.high < 0

    @property
    def sentence(self) -> str:
        """The fit in words."""
        text = (
            f"Omega_V ~ n^{self.slope:.2f} (95 % interval {self.low:.2f} to {self.high:.2f}) over {self.first:.0f} to "
            f"{self.last:.0f} text tokens: "
        )
        text += "the model looks less and less at its image" if self.falls else "no decay is established"
        return text + (f"; it levels off near {self.saturation:.3g}." if self.saturation is not None else ".")


def fit_decay(text_tokens: np.ndarray, mass: np.ndarray, seed: int = 0) -> DecayFit | None:
    """Fit the decay of one or several curves that share positions.

    Args:
        text_tokens: [S] or [S, B], text keys in sight.
        mass: [S] or [S, B], visual attention mass; columns without any mass are left out.
        seed: of the resampling.

    Returns:
        None if there are fewer than three bins of positions with mass to fit.
    """
    n = np.asarray(text_tokens, np.float64).reshape(len(text_tokens), -1)
    y = np.asarray(mass, np.float64).reshape(len(mass), -1)
    n = np.broadcast_to(n, y.shape)
    use = (y > 0).all(0) & (n > 0).all(0)
    if not use.any():
        return None
    n, y = n[:, use], y[:, use]
    if n.max() <= n.min():
        return None
    edges = np.geomspace(n.min(), n.max() * (1 + 1e-9), BINS + 1)
    bins = np.clip(np.searchsorted(edges, n, "right") - 1, 0, BINS - 1)
    xs, ys, rows = [], [], []
    for row in range(y.shape[1]):
        for b in np.unique(bins[:, row]):
            inside = bins[:, row] == b
            xs.append(np.log(n[inside, row]).mean())
            ys.append(np.log(y[inside, row]).mean())
            rows.append(row)
    x, z, row_of = np.array(xs), np.array(ys), np.array(rows)
    if len(np.unique(x.round(9))) < 3:
        return None
    slope, intercept = _line(x, z, np.ones((1, len(x))))
    weights = _bootstrap_weights(row_of, np.random.default_rng(seed))
    slopes, _ = _line(x, z, weights)
    low, high = np.nanpercentile(slopes, [2.5, 97.5])
    return DecayFit(
        slope=float(slope[0]),
        low=float(low),
        high=float(high),
        intercept=float(intercept[0]),
        saturation=_saturation(x, z),
        points=len(x),
        first=float(np.exp(x.min())),
        last=float(np.exp(x.max())),
    )


def fit_trace(trace: AttentionTrace, layer: int | None = None, skip_sinks: bool = False) -> DecayFit | None:
    """The decay of a trace, averaged over heads and over layers (or of one decoder layer).

    Args:
        trace: what the meter recorded.
        layer: index of a metered decoder layer; default: all together.
        skip_sinks: leave the first token out of the normalisation.
    """
    mass = trace.mass_without_sinks if skip_sinks else trace.mass
    if layer is not None:
        mass = mass[:, trace.layers == layer]
    return fit_decay(trace.text_tokens, np.nanmean(mass, (1, 3)))


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares for every row of weights [R, P]: slopes [R], intercepts [R]."""
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (weights @ (x * y) / total - mean_x * mean_y) / (weights @ (x * x) / total - mean_x**2)
    return slope, mean_y - slope * mean_x


def _bootstrap_weights(row_of: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each point is drawn [DRAWS, P]: rows with replacement, and bins within them."""
    points, rows = len(row_of), row_of.max() + 1
    weights = np.zeros((DRAWS, points))
    per_row = rng.multinomial(rows, np.full(rows, 1 / rows), DRAWS)
    for row in range(rows):
        mine = np.flatnonzero(row_of == row)
        within = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), DRAWS)
        weights[:, mine] = within * per_row[:, row : row + 1]
    return weights


def _saturation(x: np.ndarray, y: np.ndarray) -> float | None:
    """The level c of `mass = c + b n^s`, if it explains the logs clearly better than c = 0."""
    mass = np.exp(y)

    def bic(floor: float, parameters: int) -> tuple[float, float]:
        z = np.log(np.maximum(mass - floor, mass * 1e-3))
        slope, intercept = _line(x, z, np.ones((1, len(x))))
        error = y - np.log(floor + np.exp(intercept[0] + slope[0] * x))
        return len(y) * np.log((error**2).mean() + 1e-9) + parameters * np.log(len(y)), float(slope[0])

    plain, _ = bic(0.0, 2)
    floors = mass.min() * np.linspace(0.05, 0.99, 48)
    found = [(*bic(floor, 3), floor) for floor in floors]
    best, slope, floor = min(found)
    # a level that is never approached is an extrapolation, not a finding
    return float(floor) if best < plain - FLATTER_BY and slope < 0 and floor > 0.3 * mass.min() else None
