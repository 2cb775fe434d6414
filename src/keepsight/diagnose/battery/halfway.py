"""Change the image half-way through an output: which one do later answers follow?"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from keepsight.diagnose.battery.verdict import HalfWay
from keepsight.diagnose.cases import Case, Sample, without_images
from keepsight.diagnose.memories.interface import Inputs, Memory, Plan
from keepsight.diagnose.reader import Reader
from keepsight.diagnose.statistics import estimate

HALF_WAY = {
    "unchanged": "the same image all along",
    "image swapped": "the first half was written about one image; then another stands in its place",
    "image removed": "the first half was written about the image; then there is none",
    "memory swapped": "the model still sees the first image; only its memory is exchanged",
}


def half_way(
    reader: Reader,
    memory: Memory | None,
    own: Case,
    plan: Plan,
    inputs: Inputs,
    other: Case | None,
    images: Sample,
) -> dict[str, dict[str, Any]]:
    """Read the second half of a text under every change.

    Args:
        reader: the model.
        memory: its memory, if it has one.
        own: the text; with references, or scored as a whole.
        plan: where memories are formed in it.
        inputs: of the prompt.
        other: the other image's case, if its answers are known.
        images: the other images.

    Returns:
        Change -> "logprob" and, where they are known, "stays", "follows", "changed". Empty for a text without halves.
    """
    cut = len(own.text) // 2
    if cut < 1:
        return {}
    new = reader.inputs(replace(own.sample, images=images.images, videos=images.videos))
    gone = reader.inputs(without_images(own.sample))
    whole = {"unchanged": inputs, "image swapped": new, "image removed": gone}
    found: dict[str, dict[str, Any]] = {}
    intact: torch.Tensor | None = None
    for name, given in whole.items():
        logp = _read(reader, memory, given, own.text, plan if name != "image removed" else ())[cut:]
        intact = logp if intact is None else intact
        found[name] = _row(own, other, cut, logp, intact)
        if other is None and own.whole and name != "unchanged":
            begun, rest = reader.with_text(given, own.text[:cut]), len(own.text) - cut
            later = tuple((place - cut, kind) for place, kind in plan if place >= cut and name != "image removed")
            again = reader.write(begun, rest) if memory is None else memory.write(reader, begun, rest, later)[0]
            found[name]["changed"] = difference(own.text[cut:], again)
    if memory is not None:
        logp = memory.read_swapped(reader, inputs, new, own.text, cut, plan)
        assert intact is not None
        found["memory swapped"] = _row(own, other, cut, logp, intact)
    return found


def _read(reader: Reader, memory: Memory | None, inputs: Inputs, text: torch.Tensor, plan: Plan) -> torch.Tensor:
    return reader.read(inputs, text) if memory is None else memory.read(reader, inputs, text, plan)


def _row(own: Case, other: Case | None, cut: int, logp: torch.Tensor, intact: torch.Tensor) -> dict[str, Any]:
    text = own.text[cut:].to(logp.device)[:, None]
    row: dict[str, Any] = {"logprob": (logp - intact).gather(1, text).mean().item()}
    new = own.answers_for(other) if other is not None else None
    if new is None:
        return row
    first = logp.argmax(-1).cpu()
    asked = [(a, int(own.text[a]), b) for (a, _), b in zip(own.scored, new, strict=True)]
    asked = [(a, mine, b) for a, mine, b in asked if a >= cut and mine != b]
    if asked:
        row["stays"] = np.mean([int(first[a - cut]) == mine for a, mine, _ in asked])
        row["follows"] = np.mean([int(first[a - cut]) == b for a, _, b in asked])
    return row


def summarised(rows_by_name: dict[str, list[dict[str, Any]]]) -> list[HalfWay]:
    """Means over samples with their intervals."""
    found = []
    for name, rows in rows_by_name.items():
        columns = {key: np.array([r[key] for r in rows if key in r]) for key in ("stays", "follows", "changed")}
        known = {key: estimate(values) if len(values) else None for key, values in columns.items()}
        found.append(HalfWay(name, HALF_WAY[name], logprob=estimate(np.array([r["logprob"] for r in rows])), **known))
    return found


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of tokens that differ, 0 for equal texts."""
    return 1 - difflib.SequenceMatcher(None, a.tolist(), b.tolist(), autojunk=False).ratio()
