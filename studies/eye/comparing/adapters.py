"""VisMem's part of docs/evidence.md: what each measured adapter reads with every memory, from the raw results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keepsight.vismem.tokens import TYPES
from keepsight.words import counted
from studies.eye.comparing import latents
from studies.eye.shares import difference


def section(folder: Path) -> list[str]:
    """In markdown; nothing where no adapter was measured.

    Args:
        folder: of the raw results of `python -m studies eye adapter`.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if not found:
        return []
    lines = [
        "**VisMem on the exported eye**, trained by the product's commands ([all of them]"
        "(eye.md#vismem-by-the-products-commands)). Names of single pictures in the unseen style, the memory forced "
        "before the first word; *never*: none; *free*: as the model decides; *other*: another image's latents, while "
        "the decoder sees its own image. Right: to the letter; *named*: the thing is named in any words. "
        "One seed.",
        "",
    ]
    for raw in found:
        about = raw["conditions"]
        lines += [f"`{about['adapter']}`{_cost(about)}, by tokens of narration:", "", *latents.table(raw["rows"]), ""]
        lines += [*(f"- {line}" for line in _compared(raw["rows"])), ""]
    return lines


def _cost(conditions: dict[str, Any]) -> str:
    """What its last training took; the older results do not say."""
    training = conditions.get("training")
    if training is None:
        return ""
    return f" ({counted(training['steps'], 'step')} of rewards; {training['seconds'] / 60:.0f} minutes in all)"


def _compared(rows: list[dict[str, Any]]) -> list[str]:
    """Each memory against none, and against another image's, at the shortest and at the longest narration."""
    by = {(row["memory"], row["length"]): row for row in rows}
    lengths = sorted({row["length"] for row in rows})
    asked_at = dict.fromkeys((lengths[0], lengths[-1]))
    kinds = [kind for kind in (*TYPES, latents.FREE) if (kind, lengths[0]) in by]
    return [_line(by, kind, length) for kind in kinds for length in asked_at]


def _line(by: dict[tuple[str, int], dict[str, Any]], kind: str, length: int) -> str:
    own, none = by[kind, length]["named"], by[latents.NEVER, length]["named"]
    told = [f"names with {kind} against never at {length:,}: {_points(own, none)}"]
    other = by.get((f"{kind}, other", length))
    if other is not None:
        asked = [at for at, bit in enumerate(other["named"]) if bit != "-"]
        named = other["follows"].count("1") / max(1, len(asked))
        told.append(f"own against another image's: {_points(*(_at(bits, asked) for bits in (own, other['named'])))}")
        told.append(f"with another's, what it alone shows is named in {100 * named:.0f} %")
    return "; ".join(told)


def _points(these: str, those: str) -> str:
    mean, low, high = difference(these, those)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] points"


def _at(bits: str, places: list[int]) -> str:
    return "".join(bits[at] for at in places)
