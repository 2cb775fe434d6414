"""The demo's report: one HTML page that needs nothing but itself, for a reader who knows none of the words.

What it says stands in `report.html`; here is what has to be computed for it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from keepsight.diagnose.report.sections import NamedRow, ReportTable, TableCell
from keepsight.diagnose.report.templates import render
from keepsight.lab.demo.claims import accuracy_at, standard_error
from keepsight.lab.demo.plots import Figure, data_uri
from keepsight.lab.demo.seeds import in_words
from keepsight.lab.digits import CELLS, GLYPH, GRID
from keepsight.lab.samples import Word

NAMES = {
    "base": "Base",
    "pvm": "PVM",
    "lora": "LoRA",
    "mlp": "Parallel MLP",
    "pvm_plain": "PVM without warm-up",
    "lora_long": "LoRA at full length",
}
WHAT = {
    "base": "The small model as it came, trained on short outputs only.",
    "pvm": "Two small branches that look at the image alone, with a softmax of their own. Text cannot crowd it out.",
    "lora": "Low-rank changes of the model's own attention: the usual way to fine-tune.",
    "mlp": "Two branches of the same size in the same places that look at nothing: is it just the extra parameters?",
    "pvm_plain": "The same memory and learning rates without keepsight's blindfold, which the paper does not have.",
    "lora_long": "LoRA trained on outputs as long as the longest asked here.",
}
CONTROLS = {
    "accuracy_by_length": "base as it is",
    "masked_filler_accuracy_by_length": "filler hidden, distances kept",
    "squeezed_positions_accuracy_by_length": "filler seen, distances squeezed",
}
TAMPERED = {
    "on": "memory on",
    "gate_off": "gate off",
    "noise": "memory is noise",
    "swapped": "another image's memory, own image scored",
    "swapped_follows": "the same answers, other image scored",
}
_ORDINALS = ("first", "second", "third", "fourth")


def render_report(
    results: dict[str, Any],
    figures: dict[str, Figure],
    images: Sequence[tuple[Image.Image, list[int]]],
    narration: Sequence[Word],
) -> str:
    """The page.

    Args:
        results: content of `results.json`.
        figures: plots by name.
        images: examples with their digits; the first is the one that `narration` is about.
        narration: a few facts, word by word.
    """
    lengths, study, causal = results["lengths"], results["study"], results["pvm"]["causal"]
    image, digits = images[0]
    return render(
        __package__,
        "report.html",
        results=results,
        held={entry["name"]: entry["held"] for entry in results["verdict"]},
        short=lengths[0],
        far=lengths[-1],
        names=NAMES,
        what=WHAT,
        figures=figures,
        cells=CELLS,
        grid=GRID,
        digits=digits,
        board=_board(image),
        narration=narration,
        fact=_first_fact(narration),
        controls=_by_length(results, [("", label, "base", key) for key, label in CONTROLS.items()]),
        accuracy=_by_length(results, [(m, NAMES[m], m, "accuracy_by_length") for m in NAMES if m in results]),
        answers=results["base"]["accuracy_by_length"][str(lengths[-1])]["n"],
        standard_error=standard_error,
        mass=_mass(results["base"]["visual_attention_mass"]),
        gate_off_is_base=abs(causal["gate_off"] - accuracy_at(results, "base", causal["length"])) < 1e-6,
        tampered=_tampered(results["pvm"]["causal_by_length"]),
        closed=_closed(results) if "lora_long" in results else [],
        seeds_words=in_words(study) if study else "",
        seeds=_seeds(study) if study else None,
    )


def _board(image: Image.Image) -> str:
    """The image, enlarged, with lines between its cells, as a URI."""
    side, line = 72, 4
    board = Image.new("RGB", (GRID * side + (GRID - 1) * line,) * 2, "#8a94a0")
    for cell in range(len(CELLS)):
        column, row = cell % GRID, cell // GRID
        box = (column * GLYPH, row * GLYPH, (column + 1) * GLYPH, (row + 1) * GLYPH)
        glyph = image.crop(box).resize((side, side), resample=Image.Resampling.BICUBIC)
        board.paste(glyph, (column * (side + line), row * (side + line)))
    buffer = io.BytesIO()
    board.save(buffer, format="PNG")
    return data_uri(buffer.getvalue())


def _first_fact(words: Sequence[Word]) -> dict[str, str]:
    """The first fact of a narration, and where its cell is."""
    cell, digit = (next(word.text for word in words if word.kind == kind) for kind in ("cell", "digit"))
    return {
        "cell": cell,
        "digit": digit,
        "column": _ORDINALS["abcd".index(cell[0])],
        "row": _ORDINALS[int(cell[1]) - 1],
    }


def _row(name: str, shares: Sequence[float], *more: Any, kind: str = "") -> NamedRow:
    return NamedRow(name, "", [*(TableCell(f"{share:.0%}") for share in shares), *map(TableCell.of, more)], kind)


def _by_length(results: dict[str, Any], rows: Sequence[tuple[str, str, str, str]]) -> ReportTable:
    """Accuracies by length of output, for rows of (class of the style sheet, name, method, key); * beyond training."""
    lengths, limit = results["lengths"], results["train_length"]
    titles = ["Tokens", *(f"{n:,}{'*' * (n > limit)}" for n in lengths)]
    return ReportTable(
        titles,
        [
            _row(name, [accuracy_at(results, method, n, key) for n in lengths], kind=kind)
            for kind, name, method, key in rows
        ],
    )


def _tampered(by_length: dict[str, dict[str, float]]) -> ReportTable:
    titles = ["", *(f"after {int(n):,} tokens" for n in by_length)]
    return ReportTable(
        titles, [_row(label, [one[key] for one in by_length.values()]) for key, label in TAMPERED.items()]
    )


def _seeds(study: dict[str, Any]) -> ReportTable:
    titles = [f"After {study['length']:,} tokens", "this run", "mean", "lowest", "highest", "seeds"]
    return ReportTable(
        titles,
        [
            _row(NAMES[method], [one[n] for n in ("here", "mean", "min", "max")], one["seeds"], kind=method)
            for method, one in study["methods"].items()
        ],
    )


def _mass(found: dict[str, Any]) -> dict[str, Any]:
    """The share of attention on the image at both ends of the curves, as a mean over layers."""

    def ends(who: str) -> tuple[float, float]:
        layers = found[who]["layers"]
        return sum(layer[0] for layer in layers) / len(layers), sum(layer[-1] for layer in layers) / len(layers)

    return {"base": ends("base"), "untrained": ends("untrained"), "position": found["base"]["position"][-1]}


def _closed(results: dict[str, Any]) -> list[tuple[int, str]]:
    """(length, how much of the gap between LoRA and PVM training at full length closes there, in words)."""
    found = []
    for n in [n for n in results["lengths"] if n > results["train_length"]][-2:]:
        long, lora, pvm = (accuracy_at(results, method, n) for method in ("lora_long", "lora", "pvm"))
        gap, won = pvm - lora, long - lora
        if gap < 0.03:
            words = "what little gap there is"
        elif won > 0.5 * gap:
            words = "the gap, or nearly all of it," if won > 0.8 * gap else "most of the gap"
        else:
            words = "a part of the gap" if won > 0.1 * gap else "none of the gap"
        found.append((n, words))
    return found
