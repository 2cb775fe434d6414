"""Small charts as SVG whose colours come from the page's style sheet, so that they follow dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44


@dataclass(frozen=True)
class Line:
    """A curve: x and y [P], its name in the legend, its colour class (0 to 3), dashed or not."""

    x: np.ndarray
    y: np.ndarray
    name: str
    colour: int
    dashed: bool = False


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, title: str, log: bool = False) -> str:
    """Curves over common axes; both logarithmic if `log`."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return ""
    xs, ys = np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines])
    keep = np.isfinite(ys) & ((ys > 0) & (xs > 0) if log else np.isfinite(xs))
    if not keep.any():
        return ""
    x_axis = _Axis(xs[keep].min(), xs[keep].max(), LEFT, WIDTH - RIGHT, log)
    low = ys[keep].min() if log else min(0.0, ys[keep].min())
    y_axis = _Axis(low, ys[keep].max(), HEIGHT - BOTTOM, TOP, log)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    for line in lines:
        good = np.isfinite(line.y) & ((line.y > 0) & (line.x > 0) if log else np.isfinite(line.x))
        points = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in zip(line.x[good], line.y[good], strict=True))
        dash = ' stroke-dasharray="6 5"' if line.dashed else ""
        parts.append(f'<polyline class="c{line.colour}" points="{points}"{dash}/>')
    return _svg("".join(parts), title) + _legend(lines)


def heat_map(values: np.ndarray, rows: Sequence[str], columns: np.ndarray, x_label: str, title: str) -> str:
    """Values [R, C] in 0..1 as cells; darker (lighter in the dark) is more, on a square-root scale."""
    height = TOP + BOTTOM + max(18 * len(rows), 40)
    cell_w = (WIDTH - LEFT - RIGHT) / values.shape[1]
    cell_h = (height - TOP - BOTTOM) / len(rows)
    top = float(np.nanmax(values)) or 1.0
    parts = []
    for r, name in enumerate(rows):
        y = TOP + r * cell_h
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + cell_h / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        for c in range(values.shape[1]):
            value = float(np.nan_to_num(values[r, c]))
            opacity = math.sqrt(max(value, 0.0) / top)
            parts.append(
                f'<rect class="cell" x="{LEFT + c * cell_w:.1f}" y="{y:.1f}" width="{cell_w + 0.3:.1f}" '
                f'height="{cell_h - 1:.1f}" fill-opacity="{opacity:.2f}"/>'
            )
    for place in np.linspace(0, values.shape[1] - 1, 5).round().astype(int):
        x = LEFT + (place + 0.5) * cell_w
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{columns[place]:g}</text>'
        )
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH) / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg("".join(parts), title, height)


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
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_axis.ticks():
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    parts.append(
        f'<text class="label" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="label" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _svg(content: str, title: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><i class="c{line.colour}{" dashed" if line.dashed else ""}"></i>{escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'
