"""Questions about images behind long texts as files that anybody's trainer reads: JSONL conversations and PNG.

Training, validation and test share no image and no narration. The test is that of `studies/eye/lengths.py`: the same
images, questions and narrations, at the same lengths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from studies.eye import lengths
from studies.eye.comparing.methods import HELD_OUT
from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.lengths import Shown
from studies.eye.making.stages import generator
from studies.eye.questions import ask
from studies.eye.registries.packages import LANGUAGE_MODEL, PICTURES
from studies.eye.sizes import Size

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_TURN = re.compile(r"<\|im_start\|>(user|assistant)\n(.*?)(?=<\|im_end\|>|\Z)", re.DOTALL)
_DRAWS = {TRAIN: 11, VALIDATION: 12}
"""Of which draws images and questions are made; nothing else draws from these."""

Row = tuple[Shown, list[int], int | None]
"""What is shown and asked, the narration before the question, and its length where it is one of `lengths.LENGTHS`."""


def write(
    pictures: Pictures,
    tokenizer: Any,
    narrations: list[list[int]],
    size: Size,
    side: int,
    folder: Path,
    rows: int = 512,
    images: int = 48,
    longest: int = 256,
    seed: int = 0,
    on_progress: Callable[[str, int, int], Any] = lambda *_: None,
    shortest: int = 0,
    bold: float = 0.0,
) -> dict[str, int]:
    """Write `train.jsonl`, `validation.jsonl`, `test.jsonl`, their images and a README into `folder`.

    Args:
        pictures: all drawings.
        tokenizer: the language model's.
        narrations: tokens of each; the last two are tested behind, the one before is for validation.
        size: of the eye.
        side: pictures along the side of an image, as the model is exported: an exported model takes one size.
        folder: made where it is not there.
        rows: questions to train on, each about an image of its own.
        images: of the validation and of the test, each asked about behind every length.
        longest: tokens of narration in training, at most, and in validation.
        seed: of training and validation.
        on_progress: called with what is written, how much of it is done and of how much.
        shortest: tokens of narration in training, at least: behind more of them more of the image is forgotten.
        bold: share of the images in training that are drawn in bolder styles, which are forgotten sooner.

    Returns:
        How many questions each file holds.
    """
    last = len(narrations) - HELD_OUT
    near = [length for length in lengths.LENGTHS if length <= longest]
    test = next(these for these in lengths.shown(pictures, size, images).values() if these[0].side == side)
    sets: dict[str, tuple[int, Iterator[Row]]] = {
        TRAIN: (rows, _train(pictures, size, side, narrations[: last - 1], rows, shortest, longest, seed, bold)),
        VALIDATION: (
            images * len(near),
            _behind(_validation(pictures, size, side, images, seed), narrations[last - 1 : last], near),
        ),
        TEST: (len(test) * len(lengths.LENGTHS), _behind(test, narrations[last:], list(lengths.LENGTHS))),
    }
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (count, these) in sets.items():
        drawn, before = 0, None
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, (shown, told, length) in enumerate(these):
                on_progress(name, number, count)
                if shown is not before:  # an image is asked about at one length after the other
                    image, drawn, before = f"images/{name}-{drawn:04}.png", drawn + 1, shown
                    _save(shown.image, folder / image)
                row = conversation(shown, told, image, tokenizer)
                if length is not None:
                    row["dataset"] = f"{length} tokens"
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        found[name] = count
    (folder / "README.md").write_text(_readme(pictures, side, found), encoding="utf-8")
    return found


def conversation(shown: Shown, told: list[int], image: str, tokenizer: Any) -> dict[str, Any]:
    """A row in keepsight's chat format (docs/data.md): the image, turns that say nothing of it, question and answer.

    Args:
        shown: image, question and answer.
        told: tokens of the narration between image and question; cut within a user's turn, it ends before that.
        image: file of the image.
        tokenizer: the language model's.
    """
    turns = _TURN.findall(tokenizer.decode(told))
    while turns and (turns[-1][0] == "user" or not turns[-1][1].strip("\ufffd \n")):
        turns.pop()
    # what the language model said long ago is read, and never learnt
    between = [
        {"role": role, "content": text.rstrip("\ufffd"), **({"weight": 0} if role == "assistant" else {})}
        for role, text in turns
    ]
    question = shown.question.text
    asked = [{"role": "user", "content": f"<image>{question}"}]
    if between:
        asked = [{"role": "user", "content": "<image>"}, *between, {"role": "user", "content": question}]
    return {"messages": [*asked, {"role": "assistant", "content": shown.question.answer}], "images": [image]}


def _train(
    pictures: Pictures,
    size: Size,
    side: int,
    narrations: list[list[int]],
    rows: int,
    shortest: int,
    longest: int,
    seed: int,
    bold: float,
) -> Iterator[Row]:
    scenes = Scenes(pictures, pictures.seen)
    for number in range(rows):
        draws = generator(seed, _DRAWS[TRAIN], side, number)
        restyled = bool(bold) and float(torch.rand(1, generator=draws)) < bold
        shown = _shown(scenes, size, side, 0.5, draws, restyled)
        of, more = (int(torch.randint(n, (1,), generator=draws)) for n in (len(narrations), longest - shortest + 1))
        yield shown, narrations[of][: shortest + more], None


def _validation(pictures: Pictures, size: Size, side: int, images: int, seed: int) -> list[Shown]:
    scenes = Scenes(pictures, pictures.seen, firsts=True)
    draws = (generator(seed, _DRAWS[VALIDATION], side, number) for number in range(images))
    return [_shown(scenes, size, side, 0.0, one) for one in draws]


def _behind(these: list[Shown], narrations: list[list[int]], asked_at: list[int]) -> Iterator[Row]:
    for number, shown in enumerate(these):
        for length in asked_at:
            yield shown, narrations[number % len(narrations)][:length], length


def _shown(scenes: Scenes, size: Size, side: int, vary: float, draws: torch.Generator, bold: bool = False) -> Shown:
    image, cells = scenes.image(side, size.cell, vary, draws, bold=bold)
    while all(cell.text for cell in cells):
        image, cells = scenes.image(side, size.cell, vary, draws, bold=bold)
    return Shown(image, cells, side, ask("name", cells, side, draws))


def _save(image: torch.Tensor, file: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).numpy()).save(file)


def _readme(pictures: Pictures, side: int, found: dict[str, int]) -> str:
    tested = [lengths.STYLE] if side == 1 else pictures.seen
    told = [
        "# Questions about drawings, behind long texts",
        f"{found[TRAIN]} questions to train on, {found[VALIDATION]} to choose settings by, {found[TEST]} to test on, "
        "as docs/data.md of keepsight has them; docs/eye.md has the commands. The texts were written by "
        f"SmolLM2-135M-Instruct ({LANGUAGE_MODEL.licence}).",
        "",
        "**Not to be published.** The drawings are other people's, under the licences below. Those of share-alike "
        "sets stand in the test alone.",
        "",
        "| drawings | by | licence | in |",
        "|---|---|---|---|",
    ]
    for package in PICTURES:
        files = ([TRAIN, VALIDATION] if package.style in pictures.seen else []) + [TEST] * (package.style in tested)
        if files:
            by = f"[{package.author}]({package.source})"
            told.append(f"| {package.style} | {by} | {package.licence} | {', '.join(files)} |")
    return "\n".join([*told, ""])
