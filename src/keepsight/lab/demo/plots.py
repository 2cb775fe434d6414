"""The demo's plots, each drawn once for light and once for dark pages."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.lab.demo.claims import CHANCE
from keepsight.lab.demo.methods import LABELS

COLORS = {
    "light": {
        "base": "#6b7280",
        "pvm": "#0e7490",
        "lora": "#c2410c",
        "mlp": "#7e22ce",
        "ink": "#1f2933",
        "paper": "#ffffff",
    },
    "dark": {
        "base": "#9ca3af",
        "pvm": "#38bdf8",
        "lora": "#fb923c",
        "mlp": "#c084fc",
        "ink": "#e5e7eb",
        "paper": "#16191f",
    },
}


@dataclass(frozen=True)
class Figure:
    """A plot as PNG data URIs for light and dark pages, and what it shows in words."""

    light: str
    dark: str
    alt: str


def plot_all(results: dict[str, Any], folder: Path) -> dict[str, Figure]:
    """Write the plots as PNG (light) into `folder` and return them for the page."""
    figures = {}
    for name, draw, alt in (
        (
            "accuracy_by_length",
            _accuracy,
            "Accuracy by length of the output, one line per method; see the table below.",
        ),
        (
            "attention_mass",
            _mass,
            "Share of attention on the image by position, in the base and in an untrained model.",
        ),
        ("causal", _causal, "Accuracy with the memory on, off, with noise and with another image's memory."),
    ):
        pictures = {theme: render(draw, results, theme) for theme in COLORS}
        (folder / f"{name}.png").write_bytes(pictures["light"])
        figures[name] = Figure(data_uri(pictures["light"]), data_uri(pictures["dark"]), alt)
    return figures


def data_uri(png: bytes) -> str:
    """PNG bytes as a URI that needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def render(draw: Any, results: dict[str, Any], theme: str) -> bytes:
    """The PNG of what `draw(figure, results, colors of the theme)` draws."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    color = COLORS[theme]
    style = {
        "font.size": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": color["ink"],
        "axes.labelcolor": color["ink"],
        "axes.edgecolor": color["ink"],
        "xtick.color": color["ink"],
        "ytick.color": color["ink"],
        "figure.facecolor": color["paper"],
        "axes.facecolor": color["paper"],
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Canvas(figsize=(6.2, 4.2), dpi=170, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, results, color)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _accuracy(figure: Any, results: dict[str, Any], color: dict[str, str]) -> None:
    axes = figure.subplots()
    lengths = results["lengths"]

    def line(method: str, key: str = "accuracy_by_length", **style: Any) -> None:
        axes.plot(lengths, [results[method][key][str(n)]["accuracy"] for n in lengths], **style)

    ends: list[tuple[float, str, str]] = []
    for method in ("pvm", "lora", "mlp", "base"):
        line(method, color=color[method], marker="o", ms=5, lw=2.4)
        ends.append(
            (results[method]["accuracy_by_length"][str(lengths[-1])]["accuracy"], LABELS[method], color[method])
        )
    if "masked_filler_accuracy_by_length" in results["base"]:
        line(
            "base",
            "masked_filler_accuracy_by_length",
            color=color["base"],
            lw=1.4,
            ls="--",
            label="base, filler hidden (control)",
        )
    if "pvm_plain" in results:
        line("pvm_plain", color=color["pvm"], lw=1.4, ls=":", label=LABELS["pvm_plain"])
    if "lora_long" in results:
        line("lora_long", color=color["lora"], lw=1.4, ls=":", label=LABELS["lora_long"])
    frame(axes, lengths, results["train_length"], color)
    name_ends(axes, lengths[-1], ends)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, fontsize=10)


def frame(axes: Any, lengths: list[int], train_length: int, color: dict[str, str]) -> None:
    """All of a plot of accuracy by length but its lines."""
    axes.axvline(train_length, color=color["ink"], lw=1, alpha=0.5)
    axes.text(
        train_length * 0.95, 0.03, "trained up to here", rotation=90, va="bottom", ha="right", fontsize=10, alpha=0.8
    )
    axes.axhline(CHANCE, color=color["ink"], lw=0.8, ls=(0, (1, 3)), alpha=0.7)
    axes.text(lengths[0], CHANCE + 0.015, "guessing", fontsize=10, alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes.set_xlabel("generated tokens before the answer")
    axes.set_title("Digits read correctly", loc="left", fontsize=12)


def name_ends(axes: Any, last: int, ends: list[tuple[float, str, str]]) -> None:
    """Labels at the lines' ends (value, label, color), pushed apart where they would overlap."""
    place = 2.0
    for value, label, ink in sorted(ends, reverse=True):
        place = min(value, place - 0.06)
        axes.annotate(
            label,
            (last, place),
            xytext=(8, 0),
            textcoords="offset points",
            color=ink,
            va="center",
            fontweight="bold",
        )


def _mass(figure: Any, results: dict[str, Any], color: dict[str, str]) -> None:
    axes = figure.subplots()
    mass = results["base"]["visual_attention_mass"]
    for index, (who, ink, label) in enumerate(
        (
            ("base", color["pvm"], "base: each layer and their mean"),
            ("untrained", color["lora"], "untrained model, same architecture"),
        )
    ):
        layers = mass[who]["layers"]
        position = mass[who]["position"]
        for layer in layers:
            axes.plot(position, layer, color=ink, lw=0.8, alpha=0.35)
        mean = [sum(column) / len(column) for column in zip(*layers, strict=True)]
        axes.plot(position, mean, color=ink, lw=2.4, ls="-" if index == 0 else "--", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("generated tokens so far")
    axes.set_title("Share of attention on the image", loc="left", fontsize=12)
    ticks = [t for t in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1) if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{t:.1%}" if t < 0.01 else f"{t:.0%}" for t in ticks])
    ticks = [t for t in (1, 3, 10, 30, 100, 300, 1000, 3000) if t <= mass["base"]["position"][-1]]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower left", fontsize=10)


def _causal(figure: Any, results: dict[str, Any], color: dict[str, str]) -> None:
    axes = figure.subplots()
    causal = results["pvm"]["causal"]
    rows = [
        ("memory on", causal["on"], color["pvm"]),
        ("gate off", causal["gate_off"], color["base"]),
        ("memory is noise", causal["noise"], color["base"]),
        ("another image's memory,\nscored for the own image", causal["swapped"], color["base"]),
        ("the same answers, scored\nfor the other image", causal["swapped_follows"], color["pvm"]),
    ]
    for place, (_, value, ink) in enumerate(reversed(rows)):
        axes.barh(place, value, color=ink, height=0.62)
        axes.text(value + 0.015, place, f"{value:.0%}", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
    axes.axvline(CHANCE, color=color["ink"], lw=0.8, ls=(0, (1, 3)), alpha=0.7)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes.tick_params(axis="y", length=0)
    title = f"Digits read correctly after {causal['length']:,} tokens (dotted: guessing)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
