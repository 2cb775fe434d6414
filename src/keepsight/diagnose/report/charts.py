"""The curves of the page."""

from __future__ import annotations

import numpy as np

from keepsight.diagnose.report.overlay import mass_of
from keepsight.diagnose.report.svg import Line, heat_map, line_chart
from keepsight.diagnose.results import Diagnosis

BINS = 96  # columns of the layer-by-time map


def charts(diagnosis: Diagnosis) -> str:
    """Decay, layers by time, logit lens."""
    parts = []
    curves = []
    for written, name, colour in ((diagnosis.written, "as it is", 0), (diagnosis.written_off, "memory off", 1)):
        if written is None or written.decay is None:
            continue
        trace = written.attention[0]
        text = trace.text_tokens[:, 0].astype(float)
        curves.append(Line(*_thin(text, mass_of(written)), name, colour))
        fit = written.decay
        ends = np.geomspace(fit.first, fit.last, 2)
        curves.append(
            Line(
                ends,
                np.exp(fit.intercept) * ends**fit.slope,
                f"n^{fit.slope:.2f} [{fit.low:.2f}, {fit.high:.2f}]",
                colour,
                True,
            )
        )
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
    decay = line_chart(
        curves, "text tokens in sight", "share of attention", "Visual attention mass by text length", log=True
    )
    if decay:
        parts.append(f"<div><h2>How much it looks (visual attention mass)</h2>{decay}</div>")
    written = diagnosis.written
    if written is not None and written.decay is not None:
        trace = written.attention[0]
        bins = np.array_split(np.arange(len(trace.steps)), min(BINS, len(trace.steps)))
        values = np.stack([trace.mass[part, :, 0].mean((0, 2)) for part in bins], 1)
        columns = np.array([trace.steps[part[0]] for part in bins])
        names = [f"layer {i}" for i in trace.layers]
        chart = heat_map(values, names, columns, "tokens written", "Visual attention mass by layer and time")
        parts.append(
            f"<div><h2>By layer and time</h2>{chart}<p class=soft>Strongest cell: {100 * values.max():.1f} %.</p></div>"
        )
    lens = [
        Line(np.arange(trace.kl.shape[1], dtype=float), trace.by_depth, name, colour)
        for trace, name, colour in ((diagnosis.lens, "as it is", 0), (diagnosis.lens_off, "memory off", 1))
        if trace is not None
    ]
    chart = line_chart(lens, "decoder layer", "KL to the final prediction, nats", "Logit lens by depth")
    if chart:
        parts.append(f"<div><h2>Where predictions settle (logit lens)</h2>{chart}</div>")
    if diagnosis.lens is not None and len(diagnosis.lens.positions) > 3:
        kl = diagnosis.lens.kl
        bins = np.array_split(np.arange(len(kl)), min(BINS, len(kl)))
        values = np.stack([kl[part].mean(0) for part in bins], 1)
        columns = np.array([diagnosis.lens.positions[part[0]] for part in bins])
        names = [f"layer {i}" for i in range(kl.shape[1])]
        chart = heat_map(values, names, columns, "tokens written", "Logit lens by layer and position")
        parts.append(
            f"<div><h2>Logit lens by position</h2>{chart}"
            f"<p class=soft>Strongest cell: {values.max():.2f} nats.</p></div>"
        )
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _thin(x: np.ndarray, y: np.ndarray, points: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, evenly spread on a log axis; between them the mean."""
    if len(x) <= points:
        return x, y
    groups = np.unique(np.geomspace(1, len(x), points).astype(int) - 1)
    parts = np.split(np.arange(len(x)), groups[1:])
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])
