"""Charts of the page: attention mass by text length and layer, logit lens."""

from __future__ import annotations

import numpy as np

from keepsight.diagnose.instruments.lens import LensTrace
from keepsight.diagnose.report.overlay import mass_of
from keepsight.diagnose.report.sections import Chart, Section
from keepsight.diagnose.report.svg import Line, heat_map, line_chart
from keepsight.diagnose.results import Diagnosis, Written

BINS = 96  # columns of the layer-by-time map, at most
NO_PROOF = (
    "A falling curve proves no harm. Any model gives its image less of its attention as text grows; an untrained one "
    "falls about as fast, and so do models that still answer well. Only the answers tell whether something is lost."
)
SINKS = (
    "The first token and the image's border collect attention that means nothing (attention sinks), so they are drawn "
    "apart. The border says something only where it exceeds its share of the visual tokens."
)


def chart_sections(diagnosis: Diagnosis) -> list[Section]:
    """Decay, layers by time, logit lens."""
    looks = [chart for chart in (decay_chart(diagnosis), layer_chart(diagnosis.written)) if chart is not None]
    settles = [chart for chart in (depth_chart(diagnosis), position_chart(diagnosis.lens)) if chart is not None]
    titled = (("How much it looks at the image", looks), ("Where its predictions settle", settles))
    return [Section(title, charts=charts) for title, charts in titled if charts]


def decay_chart(diagnosis: Diagnosis) -> Chart | None:
    """Visual attention mass by text length, with the fitted power laws."""
    curves = []
    for written, name, colour in ((diagnosis.written, "as it is", 0), (diagnosis.written_off, "memory off", 1)):
        if written is None or written.decay is None:
            continue
        trace = written.attention[0]
        text = trace.text_tokens[:, 0].astype(float)
        curves.append(Line(*_thin(text, mass_of(written)), name, colour))
        fit = written.decay
        ends = np.geomspace(fit.first, fit.last, 2)
        law = f"n^{fit.slope:.2f} [{fit.low:.2f}, {fit.high:.2f}]"
        curves.append(Line(ends, np.exp(fit.intercept) * ends**fit.slope, law, colour, True))
        first = np.nanmean(trace.first_token_mass[:, :, 0], (1, 2))
        if written.memory:
            curves.append(Line(*_thin(text, first), "first token (attention sink)", 2))
            if written.memories:
                latents = np.nanmean(trace.memory_mass[:, :, 0], (1, 2))
                curves.append(Line(*_thin(text, np.where(latents > 0, latents, np.nan)), "latents of its memories", 4))
            if trace.edge_tokens[0]:
                share = trace.edge_tokens[0] / trace.visual_tokens[0]
                edge = np.nanmean(trace.edge_mass[:, :, 0], (1, 2))
                curves.append(Line(*_thin(text, edge), f"image border ({100 * share:.0f} % of visual tokens)", 3))
    title = "Visual attention mass by text length"
    chart = line_chart(curves, "text tokens in sight", "share of attention", title, log=True)
    return Chart(title, chart, curves, beside=[NO_PROOF, SINKS]) if chart else None


def layer_chart(written: Written | None) -> Chart | None:
    """Visual attention mass by layer and time."""
    if written is None or written.decay is None:
        return None
    trace = written.attention[0]
    values, edges = _by_time(trace.mass[:, :, 0].mean(2), trace.steps)
    title = "Visual attention mass by layer and time"
    names = [f"layer {i}" for i in trace.layers]
    return Chart(title, heat_map(values, names, edges, "tokens written", title, "% of attention", 100))


def depth_chart(diagnosis: Diagnosis) -> Chart | None:
    """How far each layer is from the final prediction."""
    lines = [
        Line(np.arange(trace.kl.shape[1], dtype=float), trace.by_depth, name, colour)
        for trace, name, colour in ((diagnosis.lens, "as it is", 0), (diagnosis.lens_off, "memory off", 1))
        if trace is not None
    ]
    title = "Logit lens by depth"
    chart = line_chart(lines, "decoder layer", "KL to the final prediction, nats", title)
    return Chart(title, chart, lines) if chart else None


def position_chart(lens: LensTrace | None) -> Chart | None:
    """The same by position."""
    if lens is None or len(lens.positions) < 4:
        return None
    values, edges = _by_time(lens.kl, lens.positions)
    title = "Logit lens by layer and position"
    names = [f"layer {i}" for i in range(lens.kl.shape[1])]
    return Chart(title, heat_map(values, names, edges, "tokens written", title, "nats"))


def _by_time(values: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [S, R] as means [R, C] over columns of equal length in time, and the columns' edges [C + 1]."""
    starts = np.asarray(steps, float)
    last = starts[-1] + (starts[-1] - starts[-2] if len(starts) > 1 else 1)
    edges = np.linspace(starts[0], last, min(BINS, len(starts)) + 1)
    column = np.clip(np.searchsorted(edges, starts, "right") - 1, 0, len(edges) - 2)
    kept = np.unique(column)  # steps need not be evenly spaced; a column without one joins the column before
    means = np.stack([values[column == c].mean(0) for c in kept], 1)
    return means, np.append(edges[kept], edges[-1])


def _thin(x: np.ndarray, y: np.ndarray, points: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, evenly spread on a log axis; between them the mean."""
    if len(x) <= points:
        return x, y
    groups = np.unique(np.geomspace(1, len(x), points).astype(int) - 1)
    parts = np.split(np.arange(len(x)), groups[1:])
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])
