"""The raw results of the methods on one eye, by method, length of training and seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from studies.eye.comparing.methods import METHODS, NONE, Trial

GRIDS = "unseen grids"
TRAINED = (256, 2048)
"""Longest narrations in training that are asked for: short, and the target."""


class Training(NamedTuple):
    """A method, trained behind narrations of up to `longest` tokens in so many steps of so many images, and before them
    in `look_up_steps` with no narration; with `text` held to what was expected of it.
    """

    method: str
    longest: int
    steps: int = Trial.steps
    images: int = Trial.images
    look_up_steps: int = 0
    text: bool = False

    @property
    def name(self) -> str:
        """In a sentence."""
        if self.method == NONE:
            return "the eye itself"
        longer = "" if self.steps == Trial.steps else f" in {self.steps:,} steps"
        more = "" if self.images == Trial.images else f" of {self.images} images"
        first = f", after {self.look_up_steps:,} steps of look-up" if self.look_up_steps else ""
        beside = ", with text beside" if self.text else ""
        return f"{self.method} up to {self.longest:,}{longer}{more}{first}{beside}"


@dataclass(frozen=True)
class Row:
    """One training's raw results by seed, none if it was not run.

    Missing parts (a measurement that was stopped) are missing seeds.
    """

    of: Training
    raw: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In a sentence."""
        return self.of.name

    @property
    def label(self) -> str:
        """In a table, with the number of seeds."""
        count = 0 if self.of.method == NONE else len(self.raw)
        return self.name + (f" ({count} seed{'s' * (count > 1)})" if count else "")

    def right(self, images: str, length: int, condition: str = "base") -> dict[int, str]:
        """By seed, a "1" or "0" for each image."""
        return {
            seed: row["right"]
            for seed, raw in self.raw.items()
            for row in raw.get("rows", ())
            if (row["images"], row["condition"], row["length"]) == (images, condition, length)
        }

    def memory(self, images: str, memory: str, key: str, length: int | None = None) -> dict[int, list[Any]]:
        """By seed, what `key` holds for each image under a memory, at each length or at one: `[lengths][images]`."""
        found: dict[int, list[Any]] = {}
        for seed, raw in self.raw.items():
            for row in raw.get("memories", ()):
                if (row["images"], row["memory"]) == (images, memory) and length in (None, row["length"]):
                    found.setdefault(seed, []).append(row[key])
        return found

    def memory_lengths(self) -> list[int]:
        """At which lengths other memories were tried."""
        return sorted({row["length"] for raw in self.raw.values() for row in raw.get("memories", ())})

    def language(self) -> dict[int, dict[bool, dict[str, Any]]]:
        """By seed, without (False) and with an image."""
        return {
            seed: {row["image"]: row for row in raw["language"]} for seed, raw in self.raw.items() if "language" in raw
        }

    def told(self, key: str) -> list[Any]:
        """What the trials say of themselves, seed by seed."""
        return [raw["conditions"]["trial"][key] for raw in self.raw.values()]


Rows = Mapping[Training, Row]
EYE_ITSELF = Training(NONE, 0)


def read(folder: Path, eye: str | None) -> tuple[Rows, list[str]]:
    """All rows, those that were not run among them, and the files that are left out, since they are of another eye.

    Trials with a rate of their own, and those that choose settings, are no rows.

    Args:
        folder: of the raw results.
        eye: sha256 of the eye that the page is about; None takes all.
    """
    found: dict[Training, dict[int, Any]] = {EYE_ITSELF: {}}
    found |= {Training(method, longest): {} for longest in TRAINED for method in METHODS}
    others = []
    for name, raw in _all(folder):
        trial = raw["conditions"]["trial"]
        if trial["rate"] is not None or trial["validation"]:
            continue
        if eye is not None and raw["conditions"]["eye"] != eye:
            others.append(name)
            continue
        found.setdefault(_training(trial), {})[trial["seed"]] = raw
    return {training: Row(training, raw) for training, raw in found.items()}, others


def rates(folder: Path, eye: str | None) -> dict[str, dict[float, float]]:
    """Of each method, by learning rate, the share of names right on validation: over seeds, images and lengths."""
    found: dict[str, dict[float, list[str]]] = {}
    for _, raw in _all(folder):
        trial = raw["conditions"]["trial"]
        if trial["validation"] and (eye is None or raw["conditions"]["eye"] == eye):
            name = _training(trial).name
            right = [row["right"] for row in raw.get("rows", ()) if row["condition"] == "base"]
            found.setdefault(name, {}).setdefault(trial["lr"], []).extend(right)
    return {
        name: {rate: "".join(right).count("1") / len("".join(right)) for rate, right in by_rate.items() if right}
        for name, by_rate in found.items()
    }


def _training(trial: Mapping[str, Any]) -> Training:
    images = trial.get("batch_images", Trial.images)  # the first trials do not tell theirs
    longest, before = 0 if trial["method"] == NONE else trial["longest"], trial.get("look_up_steps", 0)
    text = trial.get("text", False)
    return Training(trial["method"], longest, trial["steps"], images, before, text)


def _all(folder: Path) -> list[tuple[str, Any]]:
    return [(file.name, json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.json"))]
