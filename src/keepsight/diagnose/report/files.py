"""The charts of a diagnosis as files, for papers and slides: the page's own drawings, each an SVG by itself."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from keepsight.checkpoints.atomic import write_text
from keepsight.diagnose.report.charts import decay_chart, depth_chart, layer_chart
from keepsight.diagnose.report.latents import fact_chart, ratio_charts, where_chart
from keepsight.diagnose.report.sections import Chart
from keepsight.diagnose.report.svg import on_paper
from keepsight.diagnose.report.tables import causal_chart
from keepsight.diagnose.results import Diagnosis


def save_charts(diagnosis: Diagnosis, folder: str | Path) -> list[Path]:
    """Write what can be drawn: decay.svg, layers.svg, lens.svg, causal.svg; VisMem: invocations.svg, latents.svg.

    Args:
        diagnosis: what was found.
        folder: where to; must exist.

    Returns:
        The files written; parts that were not measured give none.
    """
    drawn: dict[str, list[Chart | None]] = {
        "decay": [decay_chart(diagnosis)],
        "layers": [layer_chart(diagnosis.written)],
        "lens": [depth_chart(diagnosis)],
        "causal": [causal_chart(diagnosis.causal)],
        "invocations": [*ratio_charts(diagnosis.invocations)],
        "latents": [chart for probe in diagnosis.probes for chart in (fact_chart(probe), where_chart(probe))],
    }
    style = files(__package__).joinpath("charts.css").read_text(encoding="utf-8")
    written = []
    for name, charts in drawn.items():
        there = [chart for chart in charts if chart is not None]
        if there:
            written.append(Path(folder) / f"{name}.svg")
            write_text(written[-1], on_paper([(c.title, c.svg, c.legend) for c in there], style))
    return written
