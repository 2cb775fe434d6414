"""Small charts as SVG whose colours come from a style sheet (charts.css), so that they follow dark and light."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 14, 44


@dataclass(frozen=True)
class Line:
    """A curve: x and y [P], its name in the legend, its colour (0 to 4), dashed or not, and a band [2, P] around it."""

    x: np.ndarray
    y: np.ndarray
    name: str
    colour: int
    dashed: bool = False
    band: np.ndarray | None = None


@dataclass(frozen=True)
class Whisker:
    """A value with its interval, named at the left, in a colour (0 to 4)."""

    name: str
    value: float
    low: float
    high: float
    colour: int


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, title: str, log: bool = False) -> Markup:
    """Curves over common axes; both logarithmic if `log`. Empty where there is nothing to draw."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return Markup("")
    xs, ys = np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines])
    keep = np.isfinite(ys) & ((ys > 0) & (xs > 0) if log else np.isfinite(xs))
    if not keep.any():
        return Markup("")
    tops = [ys[keep].max(), *(np.nanmax(line.band) for line in lines if line.band is not None)]
    x_axis = _Axis(xs[keep].min(), xs[keep].max(), LEFT, WIDTH - RIGHT, log)
    low = ys[keep].min() if log else min(0.0, ys[keep].min())
    y_axis = _Axis(low, max(tops), HEIGHT - BOTTOM, TOP, log)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for line in lines:
        good = np.isfinite(line.y) & ((line.y > 0) & (line.x > 0) if log else np.isfinite(line.x))
        if line.band is not None:
            there, back = zip(line.x, line.band[0], strict=True), zip(line.x[::-1], line.band[1][::-1], strict=True)
            edge = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in (*there, *back))
            parts.append(f'<polygon class="f{line.colour}" points="{edge}"/>')
        points = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in zip(line.x[good], line.y[good], strict=True))
        dash = ' stroke-dasharray="6 5"' if line.dashed else ""
        parts.append(f'<polyline class="c{line.colour}" points="{points}"{dash}/>')
    return _svg("".join(parts), title)


def heat_map(
    values: np.ndarray, rows: Sequence[str], edges: np.ndarray, x_label: str, title: str, unit: str, scale: float = 1
) -> Markup:
    """Values [R, C] from 0 on as cells between `edges` [C + 1] of a straight axis: deeper is more, with a legend.

    Args:
        values: what is drawn; the strongest cell is outlined.
        rows: names [R].
        edges: where each column begins, and where the last one ends.
        x_label, title: for readers.
        unit: of the legend.
        scale: by which values are multiplied in the legend.
    """
    legend = 40
    height = TOP + BOTTOM + legend + max(18 * len(rows), 40)
    bottom = height - BOTTOM - legend
    axis = _Axis(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT, False)
    cell_h = (bottom - TOP) / len(rows)
    found = np.nan_to_num(values)
    top = float(found.max()) or 1.0
    peak = np.unravel_index(found.argmax(), found.shape)
    parts = []

    def box(r: int, c: int) -> str:
        x, width = axis(edges[c]), axis(edges[c + 1]) - axis(edges[c])
        return f'x="{x:.1f}" y="{TOP + r * cell_h:.1f}" width="{width + 0.3:.1f}" height="{cell_h - 1:.1f}"'

    for r, name in enumerate(rows):
        middle = TOP + (r + 0.5) * cell_h + 4
        parts.append(f'<text x="{LEFT - 6}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for c in range(found.shape[1]):
            depth = _depth(float(found[r, c]) / top)
            parts.append(f'<rect class="cell" {box(r, c)} fill-opacity="{depth:.2f}"/>')
    parts.append(f'<rect class="peak" {box(int(peak[0]), int(peak[1]))}/>')
    for tick in axis.ticks():
        parts.append(f'<text x="{axis(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>')
    width, y = (WIDTH - RIGHT - LEFT) / 2, bottom + 48
    for step in range(32):
        x = LEFT + step * width / 32
        depth = _depth((step + 0.5) / 32)
        parts.append(f'<rect class="cell" x="{x:.1f}" y="{y}" width="{width / 32 + 0.3:.1f}" height="10" ')
        parts.append(f'fill-opacity="{depth:.2f}"/>')
    parts.append(f'<rect class="frame" x="{LEFT}" y="{y}" width="{width:.1f}" height="10"/>')
    ends = ((LEFT, "start", "0"), (LEFT + width, "end", f"{scale * top:.3g} {unit} (outlined)"))
    parts += [f'<text x="{x:.1f}" y="{y + 24}" text-anchor="{side}">{escape(text)}</text>' for x, side, text in ends]
    return _svg("".join(parts), title, height)


def _depth(share: float) -> float:
    """Opacity of a share of the strongest cell: on a square-root scale, so that weak cells are seen."""
    return math.sqrt(max(share, 0.0))


def interval_chart(rows: Sequence[Whisker], x_label: str, title: str) -> Markup:
    """Values as dots with their intervals as lines, one below the other, and a line at 0."""
    left, line = 210, 24
    bottom = TOP + line * len(rows)
    ends = [end for row in rows for end in (row.low, row.high, row.value) if math.isfinite(end)]
    axis = _Axis(min(0.0, *ends), max(0.0, *ends), left, WIDTH - RIGHT, False)
    parts = []
    for tick in axis.ticks():
        x = axis(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.3g}</text>')
    parts.append(f'<line class="zero" x1="{axis(0):.1f}" x2="{axis(0):.1f}" y1="{TOP}" y2="{bottom}"/>')
    for number, row in enumerate(rows):
        y = TOP + (number + 0.5) * line
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(row.name)}</text>')
        if math.isfinite(row.low):
            low, high = axis(row.low), axis(row.high)
            parts.append(f'<polyline class="c{row.colour}" points="{low:.1f},{y} {high:.1f},{y}"/>')
        parts.append(f'<circle class="f{row.colour}" cx="{axis(row.value):.1f}" cy="{y}" r="4.5"/>')
    parts.append(f'<text x="{(left + WIDTH) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(x_label)}</text>')
    return _svg("".join(parts), title, bottom + 44)


class _Axis:
    def __init__(self, low: float, high: float, start: float, end: float, log: bool):
        self.log, self.start, self.end = log, start, end
        low, high = float(low), float(high)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        if not self.log:
            span = self.high - self.low
            step = 10 ** math.floor(math.log10(span / 3))
            step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 6)
            return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step + 1e-9) + 1)]
        for marks in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            found = [
                m * 10.0**e
                for e in range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
                for m in marks
                if self.low - 1e-9 <= math.log10(m * 10.0**e) <= self.high + 1e-9
            ]
            if len(found) >= 3:
                break
        return found


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    parts = []
    for tick in x_axis.ticks():
        x = x_axis(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _svg(content: str, title: str, height: float = HEIGHT) -> Markup:
    return Markup(
        f'<svg class="keepsight" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{content}</svg>'
    )


PAPER = (
    "svg{--ink:#1f2933;--soft:#5b6673;--line:#dfe4e9;--hot:214,66,24;"
    "--c0:#c2410c;--c1:#0b63c5;--c2:#4d7c0f;--c3:#7c3aed;--c4:#0f766e}"
)


def on_paper(charts: Sequence[tuple[str, Markup, Sequence[Line]]], style: str) -> str:
    """Charts below each other as one SVG file, with titles and legends, in the colours of a white page.

    Args:
        charts: title, drawing and what its legend names.
        style: the style sheet of the drawings.
    """
    parts, y = [], 8.0
    for title, svg, legend in charts:
        if title:
            parts.append(
                f'<text x="{LEFT}" y="{y + 14}" style="font-weight:600;fill:var(--ink)">{escape(title)}</text>'
            )
            y += 22
        height = float(re.findall(r'viewBox="0 0 \d+ (\d+)"', svg)[0])
        parts.append(str(svg).replace("<svg ", f'<svg y="{y}" width="{WIDTH}" height="{height}" ', 1))
        y += height
        for line in legend:
            dash = ' stroke-dasharray="6 5"' if line.dashed else ""
            parts.append(f'<polyline class="c{line.colour}" points="{LEFT},{y + 8} {LEFT + 24},{y + 8}"{dash}/>')
            parts.append(f'<text x="{LEFT + 32}" y="{y + 12}">{escape(line.name)}</text>')
            y += 18
        y += 12
    return (
        f'<svg class="keepsight" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" '
        f'height="{y:.0f}"><style>{PAPER}{style.replace("width:100%; height:auto;", "")}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
