"""The report's plots: means over seeds with their 95 % intervals."""

from __future__ import annotations

import io
from typing import Any

from keepsight.lab.study.results import Results
from keepsight.lab.study.study import Plot, Study

INK = "#1f2933"
CYCLE = ("#0e7490", "#c2410c", "#7e22ce", "#15803d", "#b91c1c", "#1d4ed8", "#a16207", "#6b7280", "#be185d", "#0f766e")


def draw(study: Study, results: Results) -> bytes:
    """A study's plot as PNG; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert study.plot is not None
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context(style):
        rows = [name for name in (study.plot.rows or [row.name for row in study.rows]) if results.cells.get(name)]
        height = 3.9 if study.plot.kind == "lines" else 1.1 + 0.3 * len(rows) * max(1, len(study.plot.columns))
        figure = Figure(figsize=(7.6, height), dpi=140, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        (_lines if study.plot.kind == "lines" else _bars)(axes, study, study.plot, results, rows)
        figure.suptitle(study.title, x=0.01, ha="left", fontsize=11, color=INK)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _half(interval: Any) -> float:
    return interval.half if interval.n > 1 else 0.0


def _lines(axes: Any, study: Study, plot: Plot, results: Results, rows: list[str]) -> None:
    places = [float(column) for column in plot.columns]
    for index, name in enumerate(rows):
        there = [(x, c) for x, c in zip(places, plot.columns, strict=True) if results.values(name, c)]
        found = [results.at(name, column) for _, column in there]
        axes.errorbar(
            [x for x, _ in there],
            [100 * f.mean for f in found],
            yerr=[100 * _half(f) for f in found],
            color=CYCLE[index % len(CYCLE)],
            marker="o",
            ms=4,
            lw=1.8,
            capsize=2.5,
            label=study.row(name).label,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{int(x):,}" for x in places])
    axes.minorticks_off()
    axes.set_ylim(0, 104)
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel("% right")
    if plot.mark is not None:
        axes.axvline(plot.mark, color=INK, lw=1, ls=":", alpha=0.7)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _bars(axes: Any, study: Study, plot: Plot, results: Results, rows: list[str]) -> None:
    """A group of bars per row, the first row on top; where there are several columns, a legend tells them apart."""
    labels = {column.key: column for column in study.columns}
    several, thick = len(plot.columns) > 1, 0.8 / len(plot.columns)
    for index, column in enumerate(plot.columns):
        there = [(place, name) for place, name in enumerate(rows) if results.values(name, column)]
        found, scale = [results.at(name, column) for _, name in there], 100 if labels[column].percent else 1
        axes.barh(
            [place + (index - (len(plot.columns) - 1) / 2) * thick for place, _ in there],
            [scale * f.mean for f in found],
            xerr=[scale * _half(f) for f in found],
            color=CYCLE[index % len(CYCLE)],
            height=0.9 * thick,
            capsize=3,
            ecolor=INK,
            label=labels[column].label,
        )
    axes.set_yticks(range(len(rows)), [study.row(name).label for name in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    if all(labels[column].percent for column in plot.columns):
        axes.set_xlim(0, 104)
    first = labels[plot.columns[0]]
    named = f"{first.label} tokens" if first.label.replace(",", "").isdigit() else first.label
    axes.set_xlabel(("% right" if first.percent else "") + ("" if several else f" ({named})"))
    if several:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(plot.columns), fontsize=9)
