"""Tasks of more kinds than reading, about coloured grids of digits: what the transfer studies ask.

A *scene* is one, two or more 4 x 4 grids of handwritten digits, each digit in one of four colours, each grid on dark or
light paper. A narration is a string of facts wrapped in filler, as in `keepsight.lab.narration`, but facts are of
several kinds, each opened by a word that says which:

    read      digit b3 7 .                   perception
    colour    colour b3 red .
    locate    where red 7 b3 .               the pair is unique in the image
    count     count red 5 .                  digits in that colour
    path      path a1 4 b1 1 b2 3 .          multi-step: the running sum, modulo 10, of the digits along a path
    rows      rows r1 r3 r3 .                multi-step: which of two rows has the larger sum of digits
    pair      dark b3 7 .                    two images, told apart by their paper
    note      note opal 7 .                  says something that no pixel holds, ...
    recall    recall opal 7 .                ... to be told again later: only the text so far holds it
    moment_4  ruby b3 7 .                    four frames of a video, each behind its time: what a cell showed then

Every answer can be worked out from the images or from the text so far, and none can be copied from an earlier answer:
no question is asked twice. `pair` has 32 cells, more than a memory of 16 slots can hold one by one, and `read` has more
cells than 8 slots: there a memory must compress. `recall` against `read` tells a memory of text from one of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from keepsight.lab import narration
from keepsight.lab.digits import CELLS, GLYPH, GRID, Split, draw_glyphs
from keepsight.lab.narration import DIGITS, EOS, FILLER, IMAGE_PAD, STOP, filler_ids

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 1.0, 0.2),
    "blue": (0.3, 0.4, 1.0),
    "yellow": (1.0, 1.0, 0.2),
}
PAPERS = ("dark_paper", "light_paper")
ROWS = ("r1", "r2", "r3", "r4")
NAMES = ("opal", "ruby", "jade", "onyx", "amber", "coral", "pearl", "topaz")
KINDS = ("digit", "colour", "where", "count", "path", "rows", "note", "recall")
WORDS = (*narration.VOCABULARY, *COLOURS, *PAPERS, *ROWS, *NAMES, *KINDS)
"""The vocabulary: that of plain narrations, and what the further tasks need behind it."""
ID = {word: index for index, word in enumerate(WORDS)}

_DIGIT, _CELL, _COLOUR = ID["0"], ID[CELLS[0]], ID["red"]
_PAPER, _ROW, _NAME, _STOP = ID[PAPERS[0]], ID[ROWS[0]], ID[NAMES[0]], ID[STOP]
PATH_CELLS = 3
"""Cells on a path."""


@dataclass(frozen=True)
class Scene:
    """What B rows' images show.

    Attributes:
        images: B lists of I images of 32 x 32 pixels.
        digits, colours: [B, I, 16] in reading order.
        papers: [B, I], 0 dark and 1 light; two images of a row are on different papers, frames of a video on one.
    """

    images: list[list[Image.Image]] = field(repr=False)
    digits: np.ndarray
    colours: np.ndarray
    papers: np.ndarray


def draw_scene(rows: int, split: Split, rng: np.random.Generator, images: int = 1, video: bool = False) -> Scene:
    """Draw B scenes of I images of glyphs of one split; every frame of a video has glyphs of its own."""
    ink, digits = draw_glyphs(rows * images, split, rng)
    colours = rng.integers(0, len(COLOURS), digits.shape)
    first = rng.integers(0, 2, rows)
    papers = (first[:, None] + (0 if video else 1) * np.arange(images)) % 2
    tint = np.asarray(list(COLOURS.values()), np.float32)[colours][:, :, None, None]  # [B I, 16, 1, 1, 3]
    light = papers.reshape(-1)[:, None, None, None, None]
    ink = np.clip(ink, 0, 1)[..., None]
    pixels = np.where(light == 1, 1 - ink * (1 - 0.6 * tint), ink * tint)
    canvas = pixels.reshape(-1, GRID, GRID, GLYPH, GLYPH, 3).transpose(0, 1, 3, 2, 4, 5)
    levels = np.rint(canvas.reshape(-1, GRID * GLYPH, GRID * GLYPH, 3) * 255).astype(np.uint8)
    drawn = [Image.fromarray(level) for level in levels]
    shape = (rows, images, len(CELLS))
    nested = [drawn[i * images : (i + 1) * images] for i in range(rows)]
    return Scene(nested, digits.reshape(shape), colours.reshape(shape), papers)


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """What a batch's facts have used up, so that no question is asked twice.

    Attributes:
        orders: kind -> [B, ...] random orders from which each further fact takes the next.
        notes: [B, names], the digits of the notes, and how many were written.
    """

    rng: np.random.Generator
    orders: dict[str, np.ndarray]
    counts: dict[str, int]
    notes: np.ndarray

    @classmethod
    def fresh(cls, rows: int, rng: np.random.Generator) -> Asked:
        """Nothing asked yet."""
        return cls(rng, {}, {}, rng.integers(0, 10, (rows, len(NAMES))))

    def next(self, kind: str, rows: int, size: int) -> np.ndarray:
        """The next element [B] of a random order of 0..size-1 per row, never repeated within a kind."""
        if kind not in self.orders:
            self.orders[kind] = np.argsort(self.rng.random((rows, size)), axis=1)
            self.counts[kind] = 0
        index = self.counts[kind]
        if index >= size:
            raise ValueError(f"A narration can hold at most {size} facts of kind {kind!r}.")
        self.counts[kind] += 1
        return self.orders[kind][:, index]


def _columns(*parts: Any, rows: int) -> np.ndarray:
    return np.stack([np.broadcast_to(np.asarray(part, np.int64), (rows,)) for part in parts], axis=1)


def _take(table: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(table, index[:, None], 1)[:, 0]


def _read(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    cell = asked.next("read", rows, len(CELLS))
    return _columns(ID["digit"], cell + _CELL, _take(scene.digits[:, 0], cell) + _DIGIT, _STOP, rows=rows)


def _colour(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    cell = asked.next("colour", rows, len(CELLS))
    return _columns(ID["colour"], cell + _CELL, _take(scene.colours[:, 0], cell) + _COLOUR, _STOP, rows=rows)


def _locate(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    both = scene.colours[:, 0] * 10 + scene.digits[:, 0]  # [B, 16]
    single = (both[:, :, None] == both[:, None, :]).sum(2) == 1
    if "locate" not in asked.orders:  # unique cells first, in random order
        asked.orders["locate"] = np.argsort(asked.rng.random(both.shape) - single, axis=1)
        asked.counts["locate"] = 0
    cell = asked.next("locate", rows, len(CELLS))
    # Where a row has run out of unique cells (it has about nine), the last one asked for is asked for again.
    last = asked.orders["locate"][np.arange(rows), np.maximum(single.sum(1) - 1, 0)]
    cell = np.where(_take(single, cell), cell, last)
    pair = _take(both, cell)
    return _columns(ID["where"], pair // 10 + _COLOUR, pair % 10 + _DIGIT, cell + _CELL, _STOP, rows=rows)


def _count(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    colour = asked.next("count", rows, len(COLOURS))
    number = np.minimum((scene.colours[:, 0] == colour[:, None]).sum(1), 9)  # ten or more of 16 in one colour: 0.1 %
    return _columns(ID["count"], colour + _COLOUR, number + _DIGIT, _STOP, rows=rows)


def _path(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    cell = asked.next("path", rows, len(CELLS))
    total = np.zeros(rows, np.int64)
    parts: list[Any] = [ID["path"]]
    for step in range(PATH_CELLS):
        if step:
            cell = _neighbour(cell, asked.rng)
        total = (total + _take(scene.digits[:, 0], cell)) % 10
        parts += [cell + _CELL, total + _DIGIT]
    return _columns(*parts, _STOP, rows=rows)


def _neighbour(cell: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random cell above, below, left or right; one that would leave the grid turns round."""
    row, column = cell // GRID, cell % GRID
    sideways, step = rng.random(len(cell)) < 0.5, rng.choice([-1, 1], len(cell))
    inside = np.where(sideways, column, row) + step
    step = np.where((inside < 0) | (inside >= GRID), -step, step)
    return np.where(sideways, cell + step, cell + GRID * step)


def _rows(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    sums = scene.digits[:, 0].reshape(rows, GRID, GRID).sum(2)
    pairs = np.asarray([(a, b) for a in range(GRID) for b in range(GRID) if a != b])
    first, second = pairs[asked.next("rows", rows, len(pairs))].T
    larger = np.where(_take(sums, first) >= _take(sums, second), first, second)  # a tie: the first named
    return _columns(ID["rows"], first + _ROW, second + _ROW, larger + _ROW, _STOP, rows=rows)


def _pair(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    index = asked.next("pair", rows, 2 * len(CELLS))
    paper, cell = index // len(CELLS), index % len(CELLS)
    which = np.where(scene.papers[:, 0] == paper, 0, 1)
    digit = scene.digits[np.arange(rows), which, cell]
    return _columns(paper + _PAPER, cell + _CELL, digit + _DIGIT, _STOP, rows=rows)


def _note(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    name = asked.next("note", rows, len(NAMES))
    return _columns(ID["note"], name + _NAME, _take(asked.notes, name) + _DIGIT, _STOP, rows=rows)


def _recall(scene: Scene, asked: Asked) -> np.ndarray:
    rows = len(scene.digits)
    if "recall" not in asked.orders:
        written = asked.counts.get("note", 0)
        if not written:
            raise ValueError("'recall' asks for what a 'note' has said; put notes before it.")
        order = np.argsort(asked.rng.random((rows, written)), axis=1)
        asked.orders["recall"] = np.take_along_axis(asked.orders["note"], order, 1)
        asked.counts["recall"] = 0
    name = asked.next("recall", rows, asked.orders["recall"].shape[1])
    return _columns(ID["recall"], name + _NAME, _take(asked.notes, name) + _DIGIT, _STOP, rows=rows)


def _moment(scene: Scene, asked: Asked) -> np.ndarray:
    rows, frames = scene.papers.shape
    index = asked.next("moment", rows, frames * len(CELLS))
    frame, cell = index // len(CELLS), index % len(CELLS)
    digit = scene.digits[np.arange(rows), frame, cell]
    return _columns(frame + _NAME, cell + _CELL, digit + _DIGIT, _STOP, rows=rows)


@dataclass(frozen=True)
class Task:
    """A kind of fact.

    Attributes:
        name: of the task.
        family: "perception", "multi-step", "two images", "video" or "text".
        answers: which of the fact's tokens are answers; none for a note.
        write: makes token ids [B, length] about a scene.
        images: how many images its scenes have.
        most: facts of this kind that one narration can hold.
        chance: accuracy of guessing.
    """

    name: str
    family: str
    answers: tuple[int, ...]
    write: Callable[[Scene, Asked], np.ndarray] = field(repr=False)
    images: int = 1
    most: int = 16
    chance: float = 0.1


TASKS = {
    task.name: task
    for task in (
        Task("read", "perception", (2,), _read),
        Task("colour", "perception", (2,), _colour, chance=0.25),
        Task("locate", "perception", (3,), _locate, chance=1 / 16, most=6),
        Task("count", "perception", (2,), _count, most=4, chance=0.2),
        Task("path", "multi-step", (2, 4, 6), _path),
        Task("rows", "multi-step", (3,), _rows, chance=0.5, most=12),
        Task("pair", "two images", (2,), _pair, images=2, most=32),
        Task("note", "text", (), _note, most=8),
        Task("recall", "text", (2,), _recall, most=8),
        *(Task(f"moment_{n}", "video", (2,), _moment, images=n, most=32) for n in (2, 4, 8)),
    )
}


# --- narrations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskBatch:
    """Scenes, each with one narration of one common layout; to be used as `narration.Narrations` are.

    Attributes:
        scene: what the images show.
        input_ids: [B, T] prompt (with the images' tokens) and narration.
        start: index of the first generated token.
        answers: [A] indices into T of the answers.
        tasks: [A] the task of each answer.
        boundaries: indices into T behind each full stop, where a fact (its filler first) begins.
        begins: indices into T of each fact's own first token, behind its filler.
        filler: [T] True at filler words.
        inputs: `pixel_values`, `image_grid_thw`, `mm_token_type_ids`.
    """

    scene: Scene
    input_ids: torch.Tensor
    start: int
    answers: torch.Tensor
    tasks: tuple[str, ...]
    boundaries: tuple[int, ...]
    begins: tuple[int, ...]
    filler: torch.Tensor
    inputs: dict[str, torch.Tensor] = field(repr=False)

    @property
    def lengths(self) -> torch.Tensor:
        """[A] generated tokens that stand before each answer."""
        return self.answers - self.start

    def truth(self, roll: int = 0) -> torch.Tensor:
        """[B, A] token ids of the right answers; with `roll`, those of the row `roll` further up."""
        return torch.roll(self.input_ids[:, self.answers], roll, 0)

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the model's plain forward."""
        return {"input_ids": self.input_ids, "attention_mask": torch.ones_like(self.input_ids), **self.inputs}


def make_batch(
    processor: Any, facts: Sequence[tuple[int, str]], rows: int, split: Split, rng: np.random.Generator
) -> TaskBatch:
    """Draw scenes and write a narration about each.

    Args:
        processor: of a base that knows `WORDS`.
        facts: (filler words before it, name of its task) for every fact, the same for all rows.
        rows: B.
        split: which glyphs may appear.
        rng: the only source of chance.

    Raises:
        ValueError: tasks about one image and about two do not mix in one narration (notes and recalls go with both).
    """
    need = {TASKS[name].images for _, name in facts if TASKS[name].family != "text"} or {1}
    if len(need) > 1:
        raise ValueError("'pair' is asked about two images and other tasks about one; they need narrations apart.")
    images = need.pop()
    video = any(TASKS[name].family == "video" for _, name in facts)
    scene = draw_scene(rows, split, rng, images, video)
    asked = Asked.fresh(rows, rng)
    head = prompt_ids(processor, images, NAMES[:images] if video else ())
    columns = [np.tile(np.asarray(head, np.int64), (rows, 1))]
    is_filler, answers, names, boundaries, begins = [False] * len(head), [], [], [], []
    for gap, name in facts:
        boundaries.append(len(is_filler))
        fact = TASKS[name].write(scene, asked)
        columns += [filler_ids(rows, gap, rng), fact]
        is_filler += [True] * gap
        begins.append(len(is_filler))
        answers += [len(is_filler) + offset for offset in TASKS[name].answers]
        names += [name] * len(TASKS[name].answers)
        is_filler += [False] * fact.shape[1]
    columns.append(np.full((rows, 1), ID[EOS]))
    ids = torch.from_numpy(np.concatenate(columns, axis=1))
    pixels = processor.image_processor(images=[image for row in scene.images for image in row], return_tensors="pt")
    inputs = {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
    inputs["mm_token_type_ids"] = (ids == ID[IMAGE_PAD]).to(torch.int32)
    return TaskBatch(
        scene=scene,
        input_ids=ids,
        start=len(head),
        answers=torch.tensor(answers, dtype=torch.long),
        tasks=tuple(names),
        boundaries=tuple(boundaries),
        begins=tuple(begins),
        filler=torch.tensor([*is_filler, False]),
        inputs=inputs,
    )


def prompt_ids(processor: Any, images: int, times: Sequence[str] = ()) -> list[int]:
    """Ids of "describe" behind so many images, exactly as `processor(text=..., images=...)` would give them.

    With `times`, each image is a frame and stands behind its time, in words, as in Qwen3-VL's prompts for videos.
    """
    content: list[dict[str, str]] = []
    for index in range(images):
        content += [{"type": "text", "text": times[index]}] if times else []
        content.append({"type": "image"})
    content.append({"type": "text", "text": narration.DESCRIBE})
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor.tokenizer(prompt.replace(IMAGE_PAD, IMAGE_PAD * len(CELLS)), add_special_tokens=False)["input_ids"]


def facts_for_length(task: str, length: int, scored: int = 4) -> list[tuple[int, str]]:
    """Facts of a narration whose last `scored` ones are of `task` and stand near `length` generated tokens.

    Filler stands before the first scored fact, and up to three words before each further one. `recall` is preceded by
    eight notes at the very start.
    """
    scored = min(scored, TASKS[task].most)
    size = {"locate": 5, "rows": 5, "path": 2 * PATH_CELLS + 2}.get(task, 4)
    notes = [(0, "note")] * len(NAMES) if task == "recall" else []
    spare = length - 4 * len(notes) - scored * size
    late = max(0, min(3, spare // scored))
    return [*notes, (max(0, spare - late * (scored - 1)), task), *[(late, task)] * (scored - 1)]


assert set(FILLER).isdisjoint({*COLOURS, *ROWS, *NAMES, *KINDS, *DIGITS})
