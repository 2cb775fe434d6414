"""The fit finds exponents, intervals and saturation levels that were put in."""

from __future__ import annotations

import numpy as np
import pytest

from keepsight.diagnose.instruments.decay import fit_decay

N = np.arange(20, 4000)


def noisy(mass: np.ndarray, seed: int, sigma: float = 0.2) -> np.ndarray:
    return mass * np.exp(np.random.default_rng(seed).normal(0, sigma, mass.shape))


@pytest.mark.parametrize("slope", [-1.0, -0.5, -0.1])
def test_finds_the_exponent(slope: float) -> None:
    fit = fit_decay(N, noisy(0.9 * (N / 20.0) ** slope, 1))
    assert fit is not None
    assert abs(fit.slope - slope) < 0.03
    assert fit.falls
    assert fit.saturation is None


def test_interval_covers_the_truth_and_a_flat_curve_is_no_decay() -> None:
    inside = falls = 0
    for seed in range(40):
        fit = fit_decay(N, noisy(np.full(len(N), 0.3), seed))
        assert fit is not None
        inside += fit.low <= 0 <= fit.high
        falls += fit.falls
    assert inside >= 34
    assert falls <= 4


def test_finds_the_level_where_it_saturates() -> None:
    fit = fit_decay(N, noisy(0.02 + 4.0 / N, 3, 0.05))
    assert fit is not None
    assert fit.saturation == pytest.approx(0.02, rel=0.25)
    assert fit_decay(N, noisy(4.0 / N, 3, 0.05)).saturation is None


def test_rows_may_have_different_lengths_of_prompt() -> None:
    n = np.stack([N, N + 300], 1)
    fit = fit_decay(n, 2.0 * n**-0.7)
    assert fit is not None
    assert fit.slope == pytest.approx(-0.7, abs=1e-3)


def test_nothing_to_fit_is_none() -> None:
    assert fit_decay(N, np.zeros(len(N))) is None
    assert fit_decay(np.array([5]), np.array([0.5])) is None
    assert fit_decay(np.array([5, 6]), np.array([0.5, 0.4])) is None
