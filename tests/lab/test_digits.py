"""Images: glyphs of the splits are disjoint, and what the processor makes of an image is what was drawn."""

import numpy as np
import pytest
import torch

from keepsight.lab.digits import CELLS, SPLIT_SIZES, draw_grids, load_glyphs, split_indices
from keepsight.lab.reference import build_processor


def test_splits_are_disjoint_and_complete():
    splits = split_indices()
    assert {name: len(index) for name, index in splits.items()} == SPLIT_SIZES
    together = np.concatenate(list(splits.values()))
    assert sorted(together) == list(range(len(load_glyphs().digits)))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_image_holds_glyphs_of_its_split_only(split):
    glyphs = load_glyphs()
    levels = np.rint(glyphs.pixels * 255).astype(np.uint8)
    allowed = {levels[i].tobytes() for i in split_indices()[split]}
    images, digits = draw_grids(4, split, np.random.default_rng(0))
    for image, row in zip(images, digits, strict=True):
        assert image.size == (32, 32)
        pixels = np.asarray(image)[..., 0]
        for cell, digit in enumerate(row):
            top, left = 8 * (cell // 4), 8 * (cell % 4)
            glyph = np.ascontiguousarray(pixels[top : top + 8, left : left + 8])
            assert glyph.tobytes() in allowed
            twins = [i for i in range(len(levels)) if levels[i].tobytes() == glyph.tobytes()]
            assert digit in glyphs.digits[twins]


def test_the_processor_keeps_every_pixel():
    """One visual token per digit, in reading order, with the drawn values."""
    image, _ = draw_grids(1, "test", np.random.default_rng(3))
    inputs = build_processor().image_processor(images=image, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert inputs["pixel_values"].shape == (len(CELLS) * 4, 3 * 2 * 4 * 4)
    # [cell, patch row, patch column, channel, time, y, x]
    patches = inputs["pixel_values"].reshape(len(CELLS), 2, 2, 3, 2, 4, 4)
    drawn = torch.from_numpy(np.asarray(image[0]).astype(np.float32) / 255.0)[..., 0] * 2 - 1
    for cell in range(len(CELLS)):
        top, left = 8 * (cell // 4), 8 * (cell % 4)
        glyph = drawn[top : top + 8, left : left + 8]
        got = patches[cell].permute(2, 3, 0, 4, 1, 5).reshape(3, 2, 8, 8)
        assert torch.allclose(got, glyph.expand(3, 2, 8, 8), atol=1e-6)


def test_only_training_images_are_altered():
    rng = np.random.default_rng(0)
    plain = {np.rint(glyph * 255).astype(np.uint8).tobytes() for glyph in load_glyphs().pixels}
    image = np.asarray(draw_grids(1, "train", rng)[0][0])[..., 0]
    cells = image.reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 8, 8)
    assert not any(np.ascontiguousarray(cell).tobytes() in plain for cell in cells)


def test_the_same_seed_draws_the_same_images():
    first, second = (draw_grids(2, "train", np.random.default_rng(7)) for _ in range(2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first[0], second[0], strict=True))
    assert (first[1] == second[1]).all()
