"""The gate: does the eye read what it never saw, and as well from afar when nothing stands between?

A narration that is hidden from attention leaves its length in positions and nothing else; that is what is put between
image and question here, and `studies/eye/sequences.py` makes both the same (tests/studies/eye). Until the gate holds,
no result about narrations says anything about dilution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from studies.eye import sequences
from studies.eye.drawings import brush
from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.language import word_embeddings
from studies.eye.making.align import answers
from studies.eye.making.pretrain import average_tokens
from studies.eye.making.stages import generator
from studies.eye.questions import ask, tasks_of
from studies.eye.shares import interval
from studies.eye.sizes import Size

DISTANCES = (0, 1024, 2048)
"""Tokens of narration between image and question, hidden from attention."""
SHORT, WITHIN = 80.0, 5.0
"""The bar in percent, and how many points may be lost from afar."""
STYLE = "emojione-v1"
"""The unseen style that decides; written down after training had begun, before the gate ran. openmoji is told."""

_BATCH = 8


def measure(
    model: Any,
    tokenizer: Any,
    pictures: Pictures,
    size: Size,
    grids: int = 100,
    on_progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> dict[str, Any]:
    """Every figure of the gate, as plain JSON.

    Args:
        model, tokenizer: the language model with its eye.
        pictures: all drawings.
        size: of the eye.
        grids: how many unseen grids of each kind.
        on_progress: called with what is measured, how much of it is done and of how much.
    """
    seen = pictures.seen
    side = max(number for number in size.sides if number <= 2)
    rows = []
    for what, styles, fonts in (
        ("seen styles", seen, brush.FONTS),
        *((style, [style], (brush.HELD_OUT_FONT,)) for style in pictures.held_out),
    ):
        scenes = Scenes(pictures, styles, fonts, firsts=True)
        rows += _asked(model, tokenizer, scenes, size, 1, list(scenes.names), what, on_progress)
        rows += _asked(model, tokenizer, scenes, size, side, [None] * grids, what, on_progress)
    alone = {style: _encoder_alone(model, tokenizer, pictures, size, style) for style in pictures.held_out}
    return {"rows": rows, "encoder alone": alone, "distances": list(DISTANCES), "gate": verdict(rows)}


@torch.no_grad()
def _asked(
    model: Any,
    tokenizer: Any,
    scenes: Scenes,
    size: Size,
    side: int,
    firsts: list[Any],
    what: str,
    on_progress: Callable[[str, int, int], Any],
) -> list[dict[str, Any]]:
    """Asks every image one question of each possible task, at every distance."""
    counts: dict[str, list[list[bool]]] = {}
    kind = "single pictures" if side == 1 else f"grids {side} x {side}"
    for begin in range(0, len(firsts), _BATCH):
        on_progress(f"{what}, {kind}", begin, len(firsts))
        images, rows, asked = [], [], []
        for number in range(begin, min(begin + _BATCH, len(firsts))):
            draws = generator(size.seed, 3, side, number)  # no training draws from these
            image, cells = scenes.image(side, size.cell, 0.0, draws, firsts[number])
            tasks = tasks_of(cells, side)
            questions = [ask(task, cells, side, draws) for task in tasks]
            images.append(image)
            rows.append([sequences.part(one, tokenizer, gap) for one in questions for gap in DISTANCES])
            asked.append(tasks)
        batch, logits, _ = answers(model, tokenizer, torch.cat(images), rows, side, size)
        for tasks, right in zip(asked, sequences.exact(batch, logits), strict=True):
            for place, task in enumerate(tasks):
                at = place * len(DISTANCES)
                counts.setdefault(task, []).append(right[at : at + len(DISTANCES)])
    return [
        {
            "style": what,
            "image": kind,
            "task": task,
            "n": len(right),
            "right": [sum(column) for column in zip(*right, strict=True)],
            "lost": [sum(one[0] and not one[d] for one in right) for d in range(len(DISTANCES))],
            "won": [sum(one[d] and not one[0] for one in right) for d in range(len(DISTANCES))],
        }
        for task, right in counts.items()
    ]


@torch.no_grad()
def _encoder_alone(model: Any, tokenizer: Any, pictures: Pictures, size: Size, style: str) -> dict[str, int]:
    """How many concepts of an unseen style stand nearest to their own average over the seen styles (`right`), and how
    many nearest to their own word among the language model's embeddings (`named`)."""
    device = model.device

    def features(of: str) -> tuple[list[str], torch.Tensor]:
        found = pictures.of(of)
        drawn = pictures.pixels[list(found.values())]
        nothing = torch.zeros(len(drawn), dtype=torch.long)
        cells = brush.draw(drawn, nothing.bool(), nothing, size.cell, 0.0, generator(0)).to(device)
        return list(found), average_tokens(model.model.visual, cells, 1, size).cpu()

    of_name: dict[str, list[torch.Tensor]] = {}
    for one in pictures.seen:
        for name, feature in zip(*features(one), strict=True):
            of_name.setdefault(name, []).append(feature)
    names = list(of_name)
    centres = torch.stack([torch.stack(found).mean(0) for found in of_name.values()])
    middle = centres.mean(0)
    asked, found = features(style)
    words = word_embeddings(model, tokenizer, names).cpu()

    def nearest(to: torch.Tensor, origin: torch.Tensor) -> int:
        best = (F.normalize(found - origin, dim=-1) @ F.normalize(to - origin, dim=-1).T).argmax(-1)
        return sum(names[int(number)] == name for number, name in zip(best, asked, strict=True))

    return {"n": len(asked), "right": nearest(centres, middle), "named": nearest(words, words.mean(0))}


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the gate holds, and each of its parts: naming of single pictures in `STYLE` and of unseen grids.

    A part holds where its share at distance 0 is at least 80 % and every other is at most 5 points below it.
    """
    parts = {}
    for name, style, grid in (("an unseen style", STYLE, False), ("unseen grids", "seen styles", True)):
        row = next(
            row
            for row in rows
            if row["style"] == style and row["image"].startswith("grids") == grid and row["task"] == "name"
        )
        shares = [100 * right / row["n"] for right in row["right"]]
        parts[name] = {
            "short": shares[0] >= SHORT,
            "far": all(share >= shares[0] - WITHIN for share in shares[1:]),
            "percent": [round(share, 1) for share in shares],
            "n": row["n"],
        }
    return {"parts": parts, "holds": all(part["short"] and part["far"] for part in parts.values())}


def lines(found: dict[str, Any]) -> list[str]:
    """The figures in words, the verdict last."""
    told = []
    for row in found["rows"]:
        shares = ", ".join(
            "{:.0f} % [{:.0f}, {:.0f}]".format(100 * right / row["n"], *interval(right, row["n"]))
            for right in row["right"]
        )
        told.append(f"{row['style']}, {row['image']}, {row['task']} (n = {row['n']}): {shares}")
    for style, alone in found["encoder alone"].items():
        for by, key in (("nearest to its word", "named"), ("nearest to its average in seen styles", "right")):
            low, high = interval(alone[key], alone["n"])
            share = f"{100 * alone[key] / alone['n']:.0f} % [{low:.0f}, {high:.0f}]"
            told.append(f"the encoder alone, {style} (n = {alone['n']}), {by}: {share}")
    for name, part in found["gate"]["parts"].items():
        short = "holds" if part["short"] else "does not hold"
        far = ("holds" if part["far"] else "does not hold") if part["short"] else "says nothing where short fails"
        told.append(
            f"{name}: {part['percent'][0]} % short (at least {SHORT:.0f}: {short}); {part['percent'][1:]} % with "
            f"{DISTANCES[1:]} tokens hidden (within {WITHIN:.0f} points: {far})"
        )
    told.append(
        "The gate holds."
        if found["gate"]["holds"]
        else "The gate does not hold: nothing measured with this eye says anything about dilution."
    )
    return told
