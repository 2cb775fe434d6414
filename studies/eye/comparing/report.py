"""The methods' part of docs/evidence.md: tables, and an answer to each question, from the raw results alone."""

from __future__ import annotations

import json
from pathlib import Path

from studies.eye.comparing import kept, memories
from studies.eye.comparing.answers import answers
from studies.eye.comparing.methods import METHODS, NONE, RATES
from studies.eye.comparing.trials import EYE_ITSELF, GRIDS, Rows, rates, read
from studies.eye.gate import STYLE
from studies.eye.lengths import LENGTHS
from studies.eye.shares import share


def section(folder: Path, size: str, eye: str | None) -> list[str]:
    """In markdown.

    Args:
        folder: of the eye's raw results.
        size: of the eye.
        eye: its sha256; None takes every raw result.
    """
    rows, others = read(folder / "methods", eye)
    said = "; ".join(f"*{name}*: {what}" for name, what in METHODS.items())
    lines = [
        f"**Methods on the frozen eye.** {said}. All are shown the same images, questions and narrations, of 0 to 256 "
        "or 0 to 2,048 tokens, and measured behind narrations that none of them saw. Intervals: the wider one of two, "
        "over seeds (Student's t) and over images; differences are paired by seed and image. "
        + _rates(folder / "methods", eye),
        "",
    ]
    if others:
        lines += [f"Left out, since they are of another eye: {', '.join(others)}.", ""]
    for images, told in ((GRIDS, "Names in unseen grids"), (STYLE, f"Names in the unseen style {STYLE}")):
        found = _reading(rows, images)
        lines += [f"{told}, by tokens of narration:", "", *found, ""] if found else []
    missing = [row.name for row in rows.values() if not row.raw]
    lines += [f"Not run: {', '.join(missing)} (`python -m studies eye methods`).", ""] if missing else []
    for images, told in ((GRIDS, "grids"), (STYLE, STYLE)):
        found = _memories(rows, images)
        lines += [f"With other memories ({told}; the decoder sees its own image):", "", *found, ""] if found else []
    language = _kept(rows, folder, size)
    if language:
        told = "The language: perplexity of a text that people wrote, and plain questions right:"
        lines += [told, "", *kept.table(language), ""]
    for answer in answers(rows, language):
        lines += answer.lines()
    return lines


def _reading(rows: Rows, images: str) -> list[str]:
    lines = []
    for row in rows.values():
        cost = ["", ""]
        if row.of.method != NONE and row.raw:
            minutes = [seconds / 60 for seconds in row.told("train_cpu_seconds")]
            cost = [f"{row.told('parameters')[0] / 1e6:.1f} M", f"{sum(minutes) / len(minutes):.1f}"]
        for condition in ("base", "hidden", "repeated") if row.of.method == NONE else ("base",):
            cells = [row.right(images, length, condition) for length in LENGTHS]
            what = "" if condition == "base" else f", {condition}"
            if all(cells):
                lines.append(f"| {row.label}{what} | " + " | ".join([*map(share, cells), *cost]) + " |")
    head = "| | " + " | ".join(f"{length:,}" for length in LENGTHS) + " | parameters | CPU minutes of training |"
    return [head, "|---|" + "---|" * (len(LENGTHS) + 2), *lines] if lines else []


def _memories(rows: Rows, images: str) -> list[str]:
    these = [row for row in rows.values() if row.memory_lengths()]
    if not these:
        return []
    at = sorted({length for row in these for length in row.memory_lengths()})
    lines = ["| | memory | " + " | ".join(f"{n:,}" for n in at) + " | names what the other image alone shows |"]
    lines.append("|---|---|" + "---|" * (len(at) + 1))
    for row in these:
        for memory in memories.MEMORIES:
            cells = [row.memory(images, memory, "right", length) for length in at]
            shares = [share({seed: "".join(bits) for seed, bits in cell.items()}) if cell else "" for cell in cells]
            follows = row.memory(images, memory, "follows")
            bits = [bit for by_length in follows.values() for bit in "".join(by_length)]
            named = bits.count("1") / len(bits)
            lines.append(f"| {row.label} | {memory} | " + " | ".join([*shares, f"{100 * named:.1f} %"]) + " |")
    return lines


def _kept(rows: Rows, folder: Path, size: str) -> kept.Rows:
    """Of SmolLM2, of the eye, and of all methods that were run."""
    file = folder / f"language-{size}.json"
    found = kept.by_name(json.loads(file.read_text(encoding="utf-8"))["rows"]) if file.is_file() else {}
    if kept.EYE not in found and rows[EYE_ITSELF].language():
        found[kept.EYE] = rows[EYE_ITSELF].language()
    return found | {row.label: row.language() for row in rows.values() if row.of.method != NONE and row.language()}


def _rates(folder: Path, eye: str | None) -> str:
    tried = rates(folder, eye)
    if not tried:
        return "Learning rates were not tuned."
    told = "; ".join(
        f"{name}: " + ", ".join(f"{rate:g} {100 * right:.0f} %" for rate, right in sorted(found.items()))
        for name, found in tried.items()
    )
    own = ", ".join(f"{method} {rate:g}" for method, rate in RATES.items())
    return f"Learning rates ({own}) after names right on validation: {told}."
