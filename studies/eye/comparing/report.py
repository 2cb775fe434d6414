"""The methods' part of docs/evidence.md: tables, and an answer to each question, from the raw results alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from studies.eye.comparing import kept, memories
from studies.eye.comparing.methods import METHODS, NONE
from studies.eye.comparing.trials import TRAINED, Row, read
from studies.eye.gate import STYLE
from studies.eye.lengths import LENGTHS
from studies.eye.shares import Gap, gap, share

Rows = Mapping[tuple[str, int], Row]
GRIDS = "unseen grids"
PVM = ("pvm", "pvm-warm")
FAR = (1024, 2048)


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
        "over seeds (Student's t) and over images; differences are paired by seed and image. Learning rates were not "
        "tuned.",
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
    lines += [f"- **{question}** {answer}" for question, answer in answers(rows, language)]
    return [*lines, ""]


def _reading(rows: Rows, images: str) -> list[str]:
    lines = []
    for row in rows.values():
        cost = ["", ""]
        if row.method != NONE and row.raw:
            minutes = [seconds / 60 for seconds in row.told("train_cpu_seconds")]
            cost = [f"{row.told('parameters')[0] / 1e6:.1f} M", f"{sum(minutes) / len(minutes):.1f}"]
        for condition in ("base", "hidden", "repeated") if row.method == NONE else ("base",):
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
    if kept.EYE not in found and rows[NONE, 0].language():
        found[kept.EYE] = rows[NONE, 0].language()
    return found | {row.label: row.language() for row in rows.values() if row.method != NONE and row.language()}


def answers(rows: Rows, language: kept.Rows) -> list[tuple[str, str]]:
    """Each question of the issue, and what the numbers say to it."""
    looked_up = partial(_memory_gap, one="own", other="other", key="right")
    helped = partial(_memory_gap, one="own", other="off", key="right")
    misled = partial(_memory_gap, one="other", other="off", key="follows")
    own = "In grids, right with the own memory minus another image's"
    far = "In grids, right at 1,024 and 2,048 tokens, minus"
    found: list[tuple[str, str, Sequence[str], Callable[[Row], Gap | None]]] = [
        ("With a pretrained language model, does the look-up form by plain SFT?", own, ["pvm"], looked_up),
        ("And with the warm-up?", own, ["pvm-warm"], looked_up),
        ("Does the memory help?", "In grids, right with the own memory minus none", PVM, helped),
        *(
            (
                f"Does PVM with the warm-up read better than {rival}?",
                f"{far} {rival}",
                ["pvm-warm"],
                partial(_far, rows, rival),
            )
            for rival in ("lora", "sft", "mlp")
        ),
        (
            "Was it the unfamiliar text that the eye stumbled over?",
            f"{far} the eye itself",
            ["lora", "sft"],
            partial(_far, rows, NONE),
        ),
        (
            "Is something left that hiding the narration brings back, behind training?",
            "In grids, right at 1,024 and 2,048 tokens, hidden minus seen",
            ["lora", "sft", *PVM],
            _hidden,
        ),
        (
            "Does another image's memory make the model name what is not there?",
            "In grids, names that the other image alone shows, with its memory minus none",
            PVM,
            misled,
        ),
    ]
    told = [(question, f"{what}: {_each(rows, methods, of)}") for question, what, methods, of in found]
    told.append(("Could a check while it runs notice, by asking again without the memory?", _differences(rows)))
    told.append(("Does the language stay?", _stays(rows, language)))
    return told


def _each(rows: Rows, methods: Sequence[str], of: Callable[[Row], Gap | None]) -> str:
    """For each of the methods at each length of training: yes where the interval lies above zero."""
    these = [rows[method, longest] for method in methods for longest in TRAINED]

    def told(row: Row) -> str | None:
        found = of(row)
        if found is None:
            return None
        word = "yes" if found.low > 0 else "the contrary" if found.high < 0 else "not shown"
        return f"*{word}*, {found.told()}"

    return _listed({row.name: told(row) for row in these})


def _listed(told: Mapping[str, str | None]) -> str:
    """Of each row what is told; those of which nothing is were not run."""
    found = [f"{name} {what}" for name, what in told.items() if what is not None]
    missing = [name for name, what in told.items() if what is None]
    if not found:
        return "*not run*."
    return "; ".join([*found, f"*not run*: {', '.join(missing)}"] if missing else found) + "."


def _memory_gap(row: Row, one: str, other: str, key: str) -> Gap | None:
    """Points between two memories, over all lengths."""
    return _points(row.memory(GRIDS, one, key), row.memory(GRIDS, other, key))


def _far(rows: Rows, other: str, row: Row) -> Gap | None:
    """Points between two methods behind long narrations; the eye itself is the same for every seed."""
    these = _long(row, "base")
    if other != NONE:
        return _points(these, _long(rows[other, row.longest], "base"))
    eye = list(_long(rows[NONE, 0], "base").values())
    return _points(these, dict.fromkeys(these, eye[0])) if eye else None


def _hidden(row: Row) -> Gap | None:
    return _points(_long(row, "hidden"), _long(row, "base"))


def _long(row: Row, condition: str) -> dict[int, list[str]]:
    near, far = (row.right(GRIDS, length, condition) for length in FAR)
    return {seed: [near[seed], far[seed]] for seed in near}


def _points(these: Mapping[int, list[str]], those: Mapping[int, list[str]]) -> Gap | None:
    """In percent, of "1" and "0" for each image at each of several lengths, `[lengths][images]`."""

    def shares(found: Mapping[int, list[str]]) -> dict[int, list[float]]:
        return {
            seed: [100 * column.count("1") / len(column) for column in zip(*bits, strict=True)]
            for seed, bits in found.items()
        }

    return gap(shares(these), shares(those))


def _differences(rows: Rows) -> str:
    """How often an answer is another one than without the memory, of right, wrong and misled ones."""

    def told(row: Row) -> str | None:
        if not row.memory_lengths():
            return None
        right, wrong = (_differing(row, "own", "right", bit) for bit in "10")
        misled = _differing(row, "other", "follows", "1")
        return f"of the right {right}, of the wrong {wrong}, of the misled {misled}"

    these = [rows[method, longest] for method in PVM for longest in TRAINED]
    what = "Answers that are others than without the memory (misled: with another image's, and naming what it shows)"
    return f"{what}: {_listed({row.name: told(row) for row in these})}"


def _differing(row: Row, memory: str, key: str, bit: str) -> str:
    differ = count = 0
    for images in (GRIDS, STYLE):
        found = (row.memory(images, *of) for of in ((memory, key), (memory, "said"), ("off", "said")))
        for all_bits, all_said, all_plain in zip(*(by_seed.values() for by_seed in found), strict=True):
            for bits, said, plain in zip(all_bits, all_said, all_plain, strict=True):
                chosen = [one != two for b, one, two in zip(bits, said, plain, strict=True) if b == bit]
                differ, count = differ + sum(chosen), count + len(chosen)
    return f"{100 * differ / count:.0f} % of {count}" if count else "none"


def _stays(rows: Rows, language: kept.Rows) -> str:

    def told(row: Row) -> str | None:
        known = row.label in language
        alone, behind = (kept.against_eye(language, row.label, image) if known else None for image in (False, True))
        if alone is None or behind is None:
            return None
        word = "no" if max(alone.low, behind.low) > 0 else "no loss shown"
        return f"*{word}*, {alone.told('nats', 3)} and {behind.told('nats', 3)}"

    what = "Nats that a token of the text costs more than with the eye, alone and behind an image"
    return f"{what}: {_listed({row.name: told(row) for row in rows.values() if row.method != NONE})}"
