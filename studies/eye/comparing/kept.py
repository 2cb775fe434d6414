"""Does the language stay? A text that people wrote and plain questions, with and without an image before them.

The text is the beginning of the first of Michael Faraday's lectures on the chemical history of a candle (1861, in the
public domain; candle.txt, after Project Gutenberg's transcription no. 14474: without its footnotes, lines joined). A
language model may well have read it: what counts is what changes. A PVM without an image is silent, so it is asked
behind an image too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from studies.eye import sequences
from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.making.align import answers
from studies.eye.making.stages import generator
from studies.eye.shares import Gap, gap
from studies.eye.sizes import Size

TEXT = Path(__file__).parent / "candle.txt"
ORIGINAL, EYE = "SmolLM2", "the eye"
"""What has rows besides the methods."""
WINDOW = 256
"""Tokens of the text that are read at once, from nothing each time."""

QUESTIONS = (
    ("What is the capital of France?", "The capital of France is", "Paris"),
    ("What is the capital of Italy?", "The capital of Italy is", "Rome"),
    ("What is the capital of Japan?", "The capital of Japan is", "Tokyo"),
    ("What is the capital of Egypt?", "The capital of Egypt is", "Cairo"),
    ("In which country is the Great Wall?", "The Great Wall is in", "China"),
    ("Which language is spoken in Brazil?", "The language spoken in Brazil is", "Portuguese"),
    ("Which ocean is the largest?", "The largest ocean is the", "Pacific"),
    ("Which planet is the largest of our solar system?", "The largest planet of our solar system is", "Jupiter"),
    ("Which planet is closest to the Sun?", "The planet closest to the Sun is", "Mercury"),
    (
        "What is the star at the centre of our solar system?",
        "The star at the centre of our solar system is the",
        "Sun",
    ),
    ("What do plants take from the air?", "From the air, plants take in carbon", "dioxide"),
    ("What is water made of?", "Water is made of oxygen and", "hydrogen"),
    ("What is frozen water called?", "Frozen water is called", "ice"),
    ("How many legs does a spider have?", "A spider has", "eight"),
    ("What is the opposite of hot?", "The opposite of hot is", "cold"),
    ("What is the opposite of up?", "The opposite of up is", "down"),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William", "Shakespeare"),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da", "Vinci"),
    (
        "Who was the first president of the United States?",
        "The first president of the United States was George",
        "Washington",
    ),
)
"""Of 28 that were tried, those that SmolLM2 itself goes on with rightly: what it does not know, it cannot forget."""


@torch.no_grad()
def measure(model: Any, tokenizer: Any, of: str, pictures: Pictures | None, size: Size) -> dict[str, Any]:
    """How well a text is foretold, and which questions are answered.

    Args:
        model: any language model, or one with an eye.
        tokenizer: of the model.
        of: what it is to be called.
        pictures: an image of these stands before everything, a grid of seen styles; None: there is text alone.
        size: of the eye.

    Returns:
        A row of `of`; `image`, whether there is one; `nll`, for each window of the text the mean negative
        log-likelihood of its tokens but the first, in nats; `right`, a "1" or "0" for each question: greedy decoding
        goes on with the word, behind the beginning of the answer.
    """
    begin = "<|im_start|>" if pictures is None else "<|im_end|>\n<|im_start|>"
    turn = [] if pictures is None else tokenizer(f"{begin}assistant\n")["input_ids"]
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    parts = [
        sequences.Part(turn + ids[at : at + WINDOW], len(turn) + 1) for at in range(0, len(ids) - WINDOW + 1, WINDOW)
    ]
    windows = len(parts)
    for question, beginning, word in QUESTIONS:
        asked = f"{begin}user\n{question}{sequences.ASKED}{beginning}"
        before, after = tokenizer(asked)["input_ids"], tokenizer(f" {word}")["input_ids"]
        parts.append(sequences.Part(before + after, len(before)))
    found = _alone(model, parts) if pictures is None else _behind(model, tokenizer, parts, pictures, size)
    nll = [F.cross_entropy(logits, targets).item() for logits, targets in found[:windows]]
    right = [bool((logits.argmax(-1) == targets).all()) for logits, targets in found[windows:]]
    return {
        "of": of,
        "image": pictures is not None,
        "nll": [round(one, 5) for one in nll],
        "right": "".join(str(int(one)) for one in right),
    }


def _alone(model: Any, parts: list[sequences.Part]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and targets of each part's answer."""
    found = []
    for part in parts:
        ids = torch.tensor(part.ids, device=model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, part.answer - 1 : -1].float()
        found.append((logits, ids[part.answer :]))
    return found


def _behind(
    model: Any, tokenizer: Any, parts: list[sequences.Part], pictures: Pictures, size: Size
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same, behind an image."""
    side = max(number for number in size.sides if number <= 2)
    image, _ = Scenes(pictures, pictures.seen, firsts=True).image(side, size.cell, 0.0, generator(size.seed, 9))
    _, logits, targets = answers(model, tokenizer, image, [parts], side, size)
    counts = [len(part.ids) - part.answer for part in parts]
    return list(zip(logits.split(counts), targets.split(counts), strict=True))


Rows = Mapping[str, Mapping[int, Mapping[bool, dict[str, Any]]]]
"""Of each name, by seed, what `measure` returned without (False) and with an image."""


def against_eye(rows: Rows, name: str, image: bool) -> Gap | None:
    """Nats a token that the text costs more than with the eye alone; None where either is missing."""
    nll = {seed: one[image]["nll"] for seed, one in rows[name].items() if image in one}
    eyes = [one[image]["nll"] for one in rows.get(EYE, {}).values() if image in one]
    return gap(nll, dict.fromkeys(nll, eyes[0])) if eyes and name != EYE else None


def table(rows: Rows) -> list[str]:
    """Markdown: perplexity and questions, alone and behind an image, each against the eye's where it is there."""
    told = ["| | text alone | against the eye | questions | behind an image | against the eye | questions |"]
    told.append("|---|" + "---|" * 6)
    for name, by_seed in rows.items():
        cells = []
        for image in (False, True):
            found = [one[image] for one in by_seed.values() if image in one]
            if not found:
                cells += ["", "", ""]
                continue
            against = against_eye(rows, name, image)
            mean = sum(sum(row["nll"]) / len(row["nll"]) for row in found) / len(found)
            right = sum(row["right"].count("1") for row in found) / len(found)
            cells.append(f"{math.exp(mean):.1f}")
            cells += [against.told("nats", 3) if against else "", f"{right:.3g} of {len(found[0]['right'])}"]
        told.append(f"| {name} | " + " | ".join(cells) + " |")
    return told


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[bool, dict[str, Any]]]]:
    """Rows of several models, one seed each, as `table` takes them."""
    found: dict[str, dict[int, dict[bool, dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["of"], {0: {}})[0][row["image"]] = row
    return found
