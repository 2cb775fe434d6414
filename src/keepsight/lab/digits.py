"""Images of the lab: 4 x 4 grids of real handwritten digits, with glyphs split once into train, validation and test.

The 1,797 glyphs are the 8 x 8 digits that scikit-learn ships (`sklearn.datasets.load_digits`, written by 43 people). A
glyph belongs to exactly one split, so a model that reads a test image reads handwriting it has never seen. Everything
that was *chosen* (layers, widths, learning rates, steps) was chosen on validation images; test images are only for
reporting.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image

from keepsight.installed import MissingExtraError

Split = Literal["train", "validation", "test"]

GRID = 4
"""Digits per side of an image."""
GLYPH = 8
"""Pixels per side of a digit. With patch size 4 and merge 2 this is exactly one visual token of the language model."""
CELLS = tuple(f"{column}{row}" for row in range(1, GRID + 1) for column in "abcd")
"""Names of the cells in reading order: a1 b1 c1 d1 (top row, left to right), a2 ... d4."""
SPLIT_SIZES: dict[Split, int] = {"train": 1147, "validation": 250, "test": 400}


@dataclass(frozen=True)
class Glyphs:
    """All handwritten digits: `pixels` [1797, 8, 8] float32 in 0..1 (ink is bright) and their `digits` [1797]."""

    pixels: np.ndarray
    digits: np.ndarray


@lru_cache(maxsize=1)
def load_glyphs() -> Glyphs:
    """The 1,797 digits of scikit-learn (needs the `lab` extra)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError(
            "The lab draws its images from the handwritten digits that scikit-learn ships, and scikit-learn is not "
            "installed.",
            "lab",
        ) from error
    bunch = load_digits()
    return Glyphs((bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64))


@lru_cache(maxsize=1)
def split_indices() -> dict[Split, np.ndarray]:
    """Indices of the glyphs of each split: disjoint, covering all, and the same on every machine."""
    order = np.random.default_rng(1234).permutation(sum(SPLIT_SIZES.values()))
    indices: dict[Split, np.ndarray] = {}
    start = 0
    for split, size in SPLIT_SIZES.items():
        indices[split] = order[start : start + size]
        start += size
    return indices


def draw_grids(
    count: int, split: Split, rng: np.random.Generator, augment: bool | None = None
) -> tuple[list[Image.Image], np.ndarray]:
    """Draw `count` images of random digits.

    Args:
        count: number of images, B.
        split: which glyphs may appear.
        rng: the only source of chance.
        augment: shift each glyph by up to one pixel, vary its contrast and add noise. Default: on train images only.

    Returns:
        B RGB images of 32 x 32 pixels, and the digits [B, 16] int64 in reading order.
    """
    pixels, digits = draw_glyphs(count, split, rng, augment)
    canvas = pixels.reshape(count, GRID, GRID, GLYPH, GLYPH).transpose(0, 1, 3, 2, 4)
    canvas = canvas.reshape(count, GRID * GLYPH, GRID * GLYPH)
    levels = np.clip(np.rint(canvas * 255.0), 0, 255).astype(np.uint8)
    return [Image.fromarray(level).convert("RGB") for level in levels], digits


def draw_glyphs(
    count: int, split: Split, rng: np.random.Generator, augment: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Random digits for `count` images, as `draw_grids`: ink [B, 16, 8, 8] float32, about 0..1, and digits [B, 16]."""
    glyphs = load_glyphs()
    pool = split_indices()[split]
    index = pool[rng.integers(0, len(pool), (count, GRID * GRID))]
    pixels = glyphs.pixels[index]
    if augment if augment is not None else split == "train":
        pixels = _augmented(pixels, rng)
    return pixels, glyphs.digits[index]


def _augmented(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One-pixel shifts, contrast 0.8 to 1.1, noise of 0.05. [B, 16, 8, 8] in and out."""
    shifted = pixels.copy()
    shift = rng.integers(0, 5, pixels.shape[:2])  # 0 stays
    for kind, (axis, step) in enumerate([(2, 1), (2, -1), (3, 1), (3, -1)], start=1):
        moved = np.roll(pixels, step, axis=axis)
        edge = 0 if step == 1 else -1
        moved[(slice(None),) * axis + (edge,)] = 0.0  # what rolled around the border is not ink
        shifted = np.where((shift == kind)[..., None, None], moved, shifted)
    contrast = rng.uniform(0.8, 1.1, (*pixels.shape[:2], 1, 1)).astype(np.float32)
    return shifted * contrast + rng.normal(0.0, 0.05, pixels.shape).astype(np.float32)
