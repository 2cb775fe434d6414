"""From the raw results of many seeds: the README's picture, and what the demo's report compares itself with.

    python benchmarks/lab/draw_seeds.py

Reads benchmarks/results/lab-seeds (made by benchmarks/lab/seeds.py), writes its summary.json, docs/images/demo.png and
src/keepsight/lab/demo/seeds.json. The pages' tables are written by tools/figures.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from seeds import summarise

from keepsight.lab.demo.methods import LABELS
from keepsight.lab.demo.plots import frame, name_ends, render
from keepsight.lab.demo.seeds import STUDY

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "lab-seeds"
PICTURE = ROOT / "docs" / "images" / "demo.png"
SHOWN = ("pvm", "lora", "mlp", "base")


def shipped(summary: dict[str, Any]) -> dict[str, Any]:
    """What ships with the package of a summary."""
    return {name: summary[name] for name in ("seeds", "train_length", "plan", "accuracy_by_length")}


def draw(figure: Any, summary: dict[str, Any], color: dict[str, str]) -> None:
    """A line for each method's mean over seeds, and a band from the lowest to the highest seed."""
    axes = figure.subplots()
    found = summary["accuracy_by_length"]
    lengths = [int(n) for n in found["pvm"]]
    ends = []
    for method in SHOWN:
        entries = [found[method][str(n)] for n in lengths]
        low, high = [e["min"] for e in entries], [e["max"] for e in entries]
        axes.fill_between(lengths, low, high, color=color[method], alpha=0.18, lw=0)
        axes.plot(lengths, [e["mean"] for e in entries], color=color[method], marker="o", ms=5, lw=2.4)
        ends.append((entries[-1]["mean"], f"{LABELS[method]} ({entries[-1]['seeds']})", color[method]))
    frame(axes, lengths, summary["train_length"], color)
    axes.set_title("Digits read correctly: mean and range over (so many) seeds", loc="left", fontsize=12)
    name_ends(axes, lengths[-1], ends)


def main() -> None:
    summary = summarise(RESULTS)
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    STUDY.write_text(json.dumps(shipped(summary), indent=1) + "\n", encoding="utf-8")
    PICTURE.write_bytes(render(draw, summary, "light"))
    print("the pages' tables: make docs-figures")


if __name__ == "__main__":
    main()
