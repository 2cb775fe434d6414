"""Example images with their digits, and one narration word by word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from keepsight.data.images import open_image
from keepsight.lab.digits import CELLS, draw_grids
from keepsight.lab.narration import DESCRIBE, FILLER, READ, STOP, filler_words
from keepsight.shipped import IMAGE_NAME


@dataclass(frozen=True)
class Word:
    """A word of a narration and what it is: "filler", "cell", "digit" or "stop"."""

    text: str
    kind: str


def example_image() -> Image.Image:
    """The grid of digits that ships, for a first try that needs no file; on the command line `keepsight/digits.png`."""
    return open_image(IMAGE_NAME)


def example_images(count: int, seed: int) -> list[tuple[Image.Image, list[int]]]:
    """Images of test glyphs, with their digits in reading order."""
    images, digits = draw_grids(count, "test", np.random.default_rng([seed, 1]))
    return [(image, row.tolist()) for image, row in zip(images, digits, strict=True)]


def sample_narration(rng: np.random.Generator, seed: int, facts: int = 3, gap: int = 7) -> list[Word]:
    """The beginning of a narration about the first of `example_images(..., seed)`."""
    digits = example_images(1, seed)[0][1]
    words: list[Word] = []
    for cell in rng.permutation(len(CELLS))[:facts]:
        words += [Word(word, "filler") for word in filler_words(gap, rng)]
        words += [Word(CELLS[cell], "cell"), Word(str(digits[cell]), "digit"), Word(STOP, "stop")]
    assert all(word.text in FILLER for word in words if word.kind == "filler")
    return words


def far_reading(length: int, seed: int = 0) -> dict[str, str]:
    """A conversation in which the model reads an image far from it, as `keepsight chat` leads it.

    Returns:
        `asked`: what is asked first; `text`: the answer, `length` words of filler; `question`: what is asked then;
        `regex`: all answers that name each cell with a digit. Left to itself the model chooses the cells, and names one
        again and again.
    """
    words = filler_words(length, np.random.default_rng(seed))
    facts = " ".join(rf"{cell} [0-9] \{STOP}" for cell in CELLS)
    return {"asked": DESCRIBE, "text": " ".join(words), "question": READ, "regex": facts}
