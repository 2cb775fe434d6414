"""Prompts and texts of the lab's task: narrations about a digit grid, as token ids.

A narration is a string of *facts*, each preceded by filler words::

    the pale line moves slowly  b3 7 .  a soft stroke turns  d1 0 .  ...

The fact `b3 7 .` says that cell b3 of the image holds a 7. Cells are drawn without replacement, so no answer can be
copied from
the text so far: every digit needs a look at the image. The filler says nothing about the image. It is what makes an
output *long*: each word adds one more text key that competes with the 16 visual keys in the softmax of every attention
head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from keepsight.lab.digits import CELLS, Split, draw_grids

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, UNK, BOS, EOS, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
DIGITS = tuple("0123456789")
READ, DESCRIBE, ANSWER, STOP = "read", "describe", ":", "."
"""`read` asks for all sixteen facts in reading order; `describe` for facts in any order, wrapped in filler."""

_GRAMMAR: dict[str, tuple[str, ...]] = {
    "article": ("the", "a", "this", "that"),
    "adjective": ("pale", "soft", "dark", "thin", "round", "quiet", "old", "small"),
    "noun": ("line", "brush", "stroke", "curve", "edge", "shade", "canvas", "corner", "paper", "light"),
    "verb": ("moves", "turns", "falls", "bends", "rests", "fades", "stops", "lies"),
    "adverb": ("slowly", "gently", "again", "here", "there"),
    "preposition": ("over", "under", "near", "across", "beside"),
}
_NEXT: dict[str, dict[str, float]] = {
    "article": {"adjective": 0.6, "noun": 0.4},
    "adjective": {"noun": 1.0},
    "noun": {"verb": 0.7, "preposition": 0.3},
    "verb": {"adverb": 0.5, "preposition": 0.5},
    "adverb": {"article": 0.6, "preposition": 0.4},
    "preposition": {"article": 1.0},
}
FILLER = tuple(word for words in _GRAMMAR.values() for word in words)
VOCABULARY = (*SPECIAL, *DIGITS, *CELLS, STOP, READ, DESCRIBE, ANSWER, *FILLER)
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}

FACT_LENGTH = 3
"""Tokens of one fact: cell, digit, full stop."""
_DIGIT0, _CELL0, _FILLER0 = TOKEN["0"], TOKEN[CELLS[0]], TOKEN[FILLER[0]]


@lru_cache(maxsize=1)
def _filler_chain() -> np.ndarray:
    """Cumulative transition probabilities [40, 40] between filler words: a rough grammar with sharp word
    preferences."""
    rng = np.random.default_rng(7)
    kind = {word: name for name, words in _GRAMMAR.items() for word in words}
    table = np.zeros((len(FILLER), len(FILLER)))
    for i, word in enumerate(FILLER):
        for name, mass in _NEXT[kind[word]].items():
            words = _GRAMMAR[name]
            table[i, [FILLER.index(w) for w in words]] = mass * rng.dirichlet(np.full(len(words), 0.6))
    return np.cumsum(table, axis=1)


def filler_ids(rows: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids [rows, length] of filler phrases; each begins with an article."""
    ids = np.empty((rows, length), np.int64)
    if length == 0:
        return ids
    chain = _filler_chain()
    word = rng.integers(0, len(_GRAMMAR["article"]), rows)
    for i in range(length):
        ids[:, i] = word
        # min(): a cumulative sum can end a rounding error below 1
        word = np.minimum((chain[word] < rng.random((rows, 1))).sum(1), len(FILLER) - 1)
    return ids + _FILLER0


def filler_words(length: int, rng: np.random.Generator) -> list[str]:
    """So many words of filler."""
    return [VOCABULARY[i] for i in filler_ids(1, length, rng)[0]]


class TrainingText(Protocol):
    """What the lab's training reads of a batch: `Narrations`, and whatever a study makes to be trained on likewise."""

    @property
    def input_ids(self) -> torch.Tensor:
        """[B, T] prompt and narration."""

    @property
    def start(self) -> int:
        """Index of the first generated token."""

    @property
    def answers(self) -> torch.Tensor:
        """[A] indices into T of the answers."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the processor made of the images."""

    @property
    def lengths(self) -> torch.Tensor:
        """[A] generated tokens that stand before each answer."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Indices into T at which a fact begins."""

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the model is fed."""

    def truth(self, roll: int = 0) -> torch.Tensor:
        """The answers' token ids [B, A]."""


@dataclass(frozen=True)
class Narrations:
    """A batch of images, each with one narration; all rows share one layout, so nothing is padded.

    Attributes:
        images: B images of 32 x 32 pixels.
        digits: [B, 16], what the cells hold.
        cells: [B, F], which cell each of the F facts is about.
        input_ids: [B, T] prompt (with the image's tokens) and narration.
        start: index of the first generated token, the end of the prompt.
        answers: [F] indices into T of the digit tokens.
        filler: [T] True at filler words of the narration.
        inputs: what the processor made of the images (`pixel_values`, `image_grid_thw`), and `mm_token_type_ids`.
    """

    images: list[Image.Image]
    digits: torch.Tensor
    cells: torch.Tensor
    input_ids: torch.Tensor
    start: int
    answers: torch.Tensor
    filler: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(repr=False)

    @property
    def lengths(self) -> torch.Tensor:
        """[F] generated tokens that stand before each answer."""
        return self.answers - self.start

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Indices into T at which a fact (its filler first) begins: the start, and behind each full stop."""
        return (self.start, *(self.answers[:-1] + 2).tolist())

    def truth(self, roll: int = 0) -> torch.Tensor:
        """[B, F] token ids of the right answers; with `roll`, those of the image `roll` rows further up."""
        return torch.roll(self.digits, roll, 0).gather(1, self.cells) + _DIGIT0

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's plain forward."""
        return {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids), **self.inputs}


def prompt_messages(text: str) -> list[dict[str, Any]]:
    """A user turn with one image and `text`, as every chat template takes it."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def prompt_ids(processor: Any, text: str) -> list[int]:
    """Ids of the prompt for one lab image, exactly as `processor(text=..., images=...)` would give them."""
    prompt = processor.apply_chat_template(prompt_messages(text), tokenize=False, add_generation_prompt=True)
    return processor.tokenizer(prompt.replace(IMAGE_PAD, IMAGE_PAD * len(CELLS)), add_special_tokens=False)["input_ids"]


def make_narrations(
    processor: Any,
    gaps: Sequence[int],
    rows: int,
    split: Split,
    rng: np.random.Generator,
    *,
    prompt: str = DESCRIBE,
    ordered: bool = False,
) -> Narrations:
    """Draw images and write one narration about each.

    Args:
        processor: a transformers processor; every image goes through its image processor.
        gaps: filler words before each fact; its length is the number of facts, at most 16.
        rows: number of images, B.
        split: which glyphs may appear.
        rng: the only source of chance.
        prompt: what the user asks.
        ordered: facts in reading order instead of at random.
    """
    if len(gaps) > len(CELLS):
        raise ValueError(
            f"An image has {len(CELLS)} cells and each may be named once; {len(gaps)} facts were asked for."
        )
    images, digits = draw_grids(rows, split, rng)
    cells = np.tile(np.arange(len(CELLS)), (rows, 1)) if ordered else np.argsort(rng.random((rows, len(CELLS))), axis=1)
    cells = cells[:, : len(gaps)]
    head = prompt_ids(processor, prompt)
    columns = [np.tile(np.asarray(head, np.int64), (rows, 1))]
    answers, is_filler = [], [False] * len(head)
    for fact, gap in enumerate(gaps):
        cell = cells[:, fact : fact + 1]
        columns += [filler_ids(rows, gap, rng), cell + _CELL0, np.take_along_axis(digits, cell, 1) + _DIGIT0]
        columns.append(np.full((rows, 1), TOKEN[STOP]))
        is_filler += [True] * gap + [False] * FACT_LENGTH
        answers.append(len(is_filler) - 2)
    columns.append(np.full((rows, 1), TOKEN[EOS]))
    is_filler.append(False)
    ids = torch.from_numpy(np.concatenate(columns, axis=1))
    pixels = processor.image_processor(images=images, return_tensors="pt")
    inputs = {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
    inputs["mm_token_type_ids"] = (ids == TOKEN[IMAGE_PAD]).to(torch.int32)
    return Narrations(
        images=images,
        digits=torch.from_numpy(digits),
        cells=torch.from_numpy(cells),
        input_ids=ids,
        start=len(head),
        answers=torch.tensor(answers),
        filler=torch.tensor(is_filler),
        inputs=inputs,
    )


def gaps_for_length(length: int, facts: int = 12, scored: int = 6) -> list[int]:
    """Gaps of a narration whose last `scored` answers stand close to `length` generated tokens.

    The scored facts follow each other with at most five filler words, as in short outputs; the filler that makes the
    output long stands before and among the earlier ones.
    """
    facts = min(facts, max(scored, length // FACT_LENGTH))
    early = facts - scored
    spare = (
        length - facts * FACT_LENGTH + 1
    )  # filler words in all, such that the last answer stands at `length` or just below
    if spare < 0:
        raise ValueError(
            f"A narration of {facts} facts needs at least {facts * FACT_LENGTH - 1} tokens; length was {length}."
        )
    late = min(5, spare // facts)
    rest = spare - late * scored
    if not early:
        return [late + (rest if i == 0 else 0) for i in range(scored)]
    share, extra = divmod(rest, early)
    return [share + (i < extra) for i in range(early)] + [late] * scored
