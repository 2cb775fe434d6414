"""How reading falls with the length of a narration between image and question, and what helps without training.

For each image one sequence holds the narration once and the same question behind each of its beginnings, under every
condition; none of them sees another, and each stands where it would stand alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from studies.eye import sequences
from studies.eye.drawings import brush
from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.gate import STYLE
from studies.eye.making.align import answers
from studies.eye.making.stages import generator
from studies.eye.questions import Cell, Question, ask
from studies.eye.shares import difference, interval
from studies.eye.sizes import Size

VALIDATION = "openmoji"
"""The unseen style by which settings are chosen."""
LENGTHS = (0, 256, 512, 1024, 2048)
CONDITIONS = {
    "base": "the narration is seen",
    "hidden": "hidden from attention: its length in positions is left",
    "repeated": "the image stands again behind the narration, in the question's turn",
    "reinserted": "the image's embeddings stand again, bare, behind the question's words",
}


def asked(
    question: Question, condition: str, told: list[int], side: int, tokenizer: Any, config: Any
) -> sequences.Part:
    """A question behind a narration `told`, under one of `CONDITIONS`.

    Args:
        question: with its answer.
        condition: a key of `CONDITIONS`.
        told: the narration's tokens, as far as the question stands behind them.
        side: image tokens along the side of the image.
        tokenizer, config: of the model.
    """
    heard = 0 if condition == "hidden" else len(told)
    part = dataclasses.replace(sequences.part(question, tokenizer, len(told)), hears=heard)
    if condition == "repeated":
        more = [*tokenizer("<|im_end|>\n<|im_start|>user\n")["input_ids"], *sequences.framed(side, config)]
        return dataclasses.replace(part, ids=[*more, *part.ids], answer=part.answer + len(more))
    if condition == "reinserted":
        # not where the answer begins: there this eye reads nothing, without any narration too (LOG.md)
        more, end = [config.image_token_id] * side**2, part.answer - len(tokenizer(sequences.ASKED)["input_ids"])
        return dataclasses.replace(part, ids=[*part.ids[:end], *more, *part.ids[end:]], answer=part.answer + len(more))
    return part


@dataclass(frozen=True)
class Shown:
    """An image `[1, 3, S, S]` of the test, its cells row by row, `side` of them along a side, and what is asked."""

    image: torch.Tensor
    cells: list[Cell]
    side: int
    question: Question

    @property
    def names(self) -> list[str]:
        """Of the things that are drawn in it."""
        return [cell.name for cell in self.cells if not cell.text]


def shown(pictures: Pictures, size: Size, images: int, validation: bool = False) -> dict[str, list[Shown]]:
    """The test: unseen grids of seen styles and single pictures of `STYLE`; the same first ones for any number.

    Args:
        pictures: all drawings.
        size: of the eye.
        images: how many of either kind; singles at most one a concept.
        validation: not the test, but other grids, and `VALIDATION` instead of `STYLE`.
    """
    found = {}
    style, own = (VALIDATION, 10) if validation else (STYLE, 6)
    for what, styles, fonts, side in (
        ("unseen grids", pictures.seen, brush.FONTS, max(number for number in size.sides if number <= 2)),
        (style, [style], (brush.HELD_OUT_FONT,), 1),
    ):
        scenes = Scenes(pictures, styles, fonts, firsts=True)
        firsts = list(scenes.names) if side == 1 else [None] * images
        these = []
        for number, first in enumerate(firsts[:images]):
            draws = generator(size.seed, own, side, number)
            image, cells = scenes.image(side, size.cell, 0.0, draws, first)
            while all(cell.text for cell in cells):
                image, cells = scenes.image(side, size.cell, 0.0, draws, first)
            these.append(Shown(image, cells, side, ask("name", cells, side, draws)))
        found[what] = these
    return found


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    pictures: Pictures,
    size: Size,
    narrations: list[list[int]],
    images: int,
    conditions: tuple[str, ...] = tuple(CONDITIONS),
    on_progress: Callable[[str, int, int], Any] = lambda *_: None,
    validation: bool = False,
) -> list[dict[str, Any]]:
    """Names in unseen grids of seen styles and in single pictures of `STYLE`, one question an image (see `shown`).

    Args:
        model, tokenizer: the language model with its eye.
        pictures: all drawings.
        size: of the eye.
        narrations: tokens of each; image number n stands before narration n modulo their number.
        images, validation: see `shown`.
        conditions: keys of `CONDITIONS`.
        on_progress: called with what is measured, how much of it is done and of how much.

    Returns:
        Rows of `images`, `condition`, `length`, and `right`: a "1" or "0" for each image, in the same order everywhere.
    """
    longest = max(LENGTHS)
    rows = []
    for what, these in shown(pictures, size, images, validation).items():
        found: dict[tuple[str, int], str] = {}
        for number, one in enumerate(these):
            on_progress(what, number, len(these))
            told = narrations[number % len(narrations)]
            keys = [(condition, length) for length in LENGTHS for condition in conditions]
            parts = [
                asked(one.question, condition, told[:length], one.side * size.tokens, tokenizer, model.config)
                for condition, length in keys
            ]
            parts.insert(0, sequences.Part(told[:longest], longest))
            batch, logits, _ = answers(model, tokenizer, one.image, [parts], one.side, size)
            for key, right in zip(keys, sequences.exact(batch, logits)[0], strict=True):
                found[key] = found.get(key, "") + str(int(right))
        rows += [
            {"images": what, "condition": condition, "length": length, "right": right}
            for (condition, length), right in found.items()
        ]
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a table of shares for each kind of images, with intervals, and the paired differences far off."""
    told = []
    for what in dict.fromkeys(row["images"] for row in rows):
        of = {(row["condition"], row["length"]): row["right"] for row in rows if row["images"] == what}
        count = len(next(iter(of.values())))
        told += [
            f"Names in {what}, n = {count}:" if what != STYLE else f"Names in the unseen style {what}, n = {count}:"
        ]
        told += ["", "| tokens of narration | " + " | ".join(map(str, LENGTHS)) + " |", "|---|" + "---|" * len(LENGTHS)]
        for condition in dict.fromkeys(condition for condition, _ in of):
            cells = []
            for length in LENGTHS:
                right = of[condition, length]
                low, high = interval(right.count("1"), len(right))
                cells.append(f"{100 * right.count('1') / len(right):.0f} % [{low:.0f}, {high:.0f}]")
            told.append(f"| {condition} | " + " | ".join(cells) + " |")
        told.append("")
        for length in (1024, 2048):
            for condition in ("hidden", "repeated", "reinserted"):
                if (condition, length) in of:
                    gap = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*difference(of[condition, length], of["base", length]))
                    told.append(f"- {condition} against base at {length}: {gap} points, image by image")
        told.append("")
    return told
