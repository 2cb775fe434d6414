"""Is the memory read? The same questions with the own image's memory, another's, noise in its place, and none.

The decoder sees its own image each time. What is written is kept, so that it can be told how often a memory makes the
model name what is not there, and how often its answer is the same without the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from keepsight.diagnose.memories.pvm import remembered
from keepsight.pvm import replace_memory
from studies.eye import lengths, sequences
from studies.eye.drawings.pictures import Pictures
from studies.eye.making.align import answers
from studies.eye.making.stages import generator
from studies.eye.questions import named
from studies.eye.sizes import Size

MEMORIES = {
    "own": "of the image that is seen",
    "other": "of another image",
    "noise": "noise of the same size",
    "off": "none: the eye as it was",
}


@torch.no_grad()
def measure(
    model: Any,
    off: Callable[[], AbstractContextManager[Any]],
    tokenizer: Any,
    pictures: Pictures,
    size: Size,
    narrations: list[list[int]],
    images: int,
    longest: int = max(lengths.LENGTHS),
    on_progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Names under every one of `MEMORIES`, for the first images of `lengths.measure`.

    Another image is the next one that lacks what is asked for and shows something that the own one does not.

    Args:
        model: the language model with its eye and a PVM on it.
        off: enters a block without the PVM.
        tokenizer: of the model.
        pictures: all drawings.
        size: of the eye.
        narrations: tokens of each, as `lengths.measure` takes them.
        images: how many of either kind.
        longest: of `lengths.LENGTHS`, those up to this one.
        on_progress: called with what is measured, how much of it is done and of how much.

    Returns:
        Rows of `images`, `memory`, `length`; `right` and `follows`, a "1" or "0" for each image: the answer is right,
        or names what the other image alone shows; and `said`, the answers: each as far as greedy decoding goes along
        with a right or a following answer, and one token further.
    """
    asked_at = [length for length in lengths.LENGTHS if length <= longest]
    rows = []
    for what, these in lengths.shown(pictures, size, images).items():
        found: dict[tuple[str, int], dict[str, Any]] = {
            (memory, length): {"right": "", "follows": "", "said": []} for memory in MEMORIES for length in asked_at
        }
        embeds = [_embeds(model, tokenizer, one, size) for one in these]
        for number, one in enumerate(these):
            on_progress(f"the memory, {what}", number, len(these))
            other = _other(these, number)
            follows = [named(name) for name in dict.fromkeys(these[other].names) if name not in one.names]
            told = narrations[number % len(narrations)][: max(asked_at)]
            conditions: dict[str, AbstractContextManager[Any]] = {
                "own": nullcontext(),
                "other": _replaced(embeds[other]),
                "noise": _replaced(_noise(embeds[number], generator(size.seed, 8, number))),
                "off": off(),
            }
            for memory, condition in conditions.items():
                with condition:
                    read = _read(model, tokenizer, one, follows, told, asked_at, size)
                for length, candidates in zip(asked_at, read, strict=True):
                    ids, row = [ids for ids, _ in candidates], found[memory, length]
                    written = greedy(candidates)
                    row["right"] += str(int(written == ids[0]))
                    row["follows"] += str(int(written in ids[1 : 1 + len(follows)]))
                    row["said"].append(tokenizer.decode(written, skip_special_tokens=True))
        rows += [{"images": what, "memory": memory, "length": n, **row} for (memory, n), row in found.items()]
    return rows


def _read(
    model: Any,
    tokenizer: Any,
    one: lengths.Shown,
    follows: list[str],
    told: list[int],
    asked_at: list[int],
    size: Size,
) -> list[list[tuple[list[int], list[int]]]]:
    """For each length candidates as `greedy` takes them: the right answer, those that follow, the other article."""
    texts = [one.question.answer, *follows, _other_article(one.question.answer)]
    side = one.side * size.tokens
    parts = [
        lengths.asked(
            dataclasses.replace(one.question, answer=text), "base", told[:length], side, tokenizer, model.config
        )
        for length in asked_at
        for text in texts
    ]
    parts.insert(0, sequences.Part(told, len(told)))
    _, logits, targets = answers(model, tokenizer, one.image, [parts], one.side, size)
    counts = [len(part.ids) - part.answer for part in parts[1:]]
    found = [
        (ids.tolist(), best.tolist())
        for ids, best in zip(targets.split(counts), logits.argmax(-1).split(counts), strict=True)
    ]
    return [found[at : at + len(texts)] for at in range(0, len(found), len(texts))]


def greedy(candidates: list[tuple[list[int], list[int]]]) -> list[int]:
    """What greedy decoding writes as long as it writes the beginning of a candidate, and one token further.

    Args:
        candidates: the tokens of each, and the likeliest token at each of their places after those before it.
    """
    written: list[int] = []
    while True:
        going = (best for ids, best in candidates if len(ids) > len(written) and ids[: len(written)] == written)
        best = next(going, None)
        if best is None:
            return written
        written.append(best[len(written)])


def _other(these: list[lengths.Shown], number: int) -> int:
    """The next image that lacks what image `number` is asked for, and shows something that it does not."""
    one = these[number]
    for step in range(1, len(these)):
        names = these[(number + step) % len(these)].names
        if all(named(name) != one.question.answer for name in names) and not set(names) <= set(one.names):
            return (number + step) % len(these)
    raise ValueError(f"{len(these)} images, and none could stand for another image of number {number}: ask for more.")


def _other_article(answer: str) -> str:
    """The answer with the wrong article, behind which most other names are told."""
    return "A" + answer[2:] if answer.startswith("An ") else "An" + answer[1:]


def _embeds(model: Any, tokenizer: Any, one: lengths.Shown, size: Size) -> torch.Tensor:
    """`[1, M, D]`: what the memory is given of an image."""
    with remembered() as seen:
        answers(model, tokenizer, one.image, [[sequences.part(one.question, tokenizer)]], one.side, size)
    return torch.cat(seen)


def _noise(embeds: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    return torch.randn(embeds.shape, generator=draws).to(embeds) * embeds.square().mean().sqrt()


@contextmanager
def _replaced(given: torch.Tensor) -> Iterator[None]:
    with replace_memory(lambda embeds, valid: given.to(embeds)):
        yield
