"""Linear probes: what a linear map can read out of vectors, with shuffled labels as the control."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class ProbeScore:
    """Right answers of one probe on images that it was not fitted on.

    Attributes:
        right: [n, F] bool, of n images and F questions with the same classes.
        majority: share of the most frequent class in the test labels, mean over questions: what guessing reaches.
    """

    right: np.ndarray
    majority: float


def linear_probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray) -> ProbeScore:
    """Ridge regression onto one-hot labels; its penalty is chosen on a fifth of the training images.

    Args:
        train_x: [n, D] features.
        train_y: [n, F] integer labels of F questions.
        test_x: [m, D].
        test_y: [m, F].
    """
    classes = int(max(train_y.max(), test_y.max())) + 1
    mean, spread = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / spread, (test_x - mean) / spread
    hot = np.eye(classes)[train_y]  # [n, F, classes]
    hold = max(1, len(train_x) // 5)
    penalty = max(
        PENALTIES,
        key=lambda p: float((_fit(train_x[hold:], hot[hold:], train_x[:hold], p) == train_y[:hold]).mean()),
    )
    right = _fit(train_x, hot, test_x, penalty) == test_y
    majority = float(np.mean([np.bincount(column).max() / len(column) for column in test_y.T]))
    return ProbeScore(right, majority)


def _fit(x: np.ndarray, hot: np.ndarray, test_x: np.ndarray, penalty: float) -> np.ndarray:
    """Predicted labels [m, F]; the penalty is relative to the mean square of the features."""
    centre = hot.mean(0)
    targets = (hot - centre).reshape(len(x), -1)
    kernel = x @ x.T
    weights = np.linalg.solve(kernel + penalty * (np.trace(kernel) / len(x)) * np.eye(len(x)), targets)
    return ((test_x @ x.T @ weights).reshape(len(test_x), *hot.shape[1:]) + centre).argmax(-1)


def shuffled(labels: np.ndarray, seed: int) -> np.ndarray:
    """Labels [n, F] dealt out to other images, all questions of an image together."""
    return labels[np.random.default_rng(seed).permutation(len(labels))]
