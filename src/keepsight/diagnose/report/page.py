"""Fills the page's template with a diagnosis."""

from __future__ import annotations

import json

from markupsafe import Markup

from keepsight.diagnose.report.charts import chart_sections
from keepsight.diagnose.report.latents import invocation_sections, probe_sections
from keepsight.diagnose.report.overlay import data, layout_of, marks, pictures, views_of
from keepsight.diagnose.report.plain import opening
from keepsight.diagnose.report.tables import causal_sections, length_sections
from keepsight.diagnose.report.templates import render
from keepsight.diagnose.results import Diagnosis


def render_report(diagnosis: Diagnosis) -> str:
    """The whole page."""
    layout = layout_of(diagnosis.written)
    views = views_of(diagnosis, layout)
    found = data(diagnosis, views, layout)
    return render(
        __package__,
        "diagnosis.html",
        found=diagnosis,
        facts=_facts(diagnosis),
        opening=opening(diagnosis),
        figures=_figures(diagnosis),
        views=[view["name"] for view in views],
        pictures=pictures(diagnosis, layout),
        marks=marks(diagnosis.written),
        sections=[
            *chart_sections(diagnosis),
            *causal_sections(diagnosis.causal),
            *invocation_sections(diagnosis.invocations),
            *probe_sections(diagnosis.probes),
            *length_sections(diagnosis.lengths),
        ],
        data=Markup(json.dumps(found, allow_nan=False).replace("<", "\\u003c")),
    )


def _facts(diagnosis: Diagnosis) -> str:
    facts = diagnosis.model
    at = ", ".join(map(str, facts["memory_layers"]))
    latents = ", ".join(f"{n} {kind}" for kind, n in facts["memory_latents"].items())
    where = f" at layers {at}" if at else f" of {latents} latents" if latents else ""
    memory = f"{facts['memory']}{where}" if facts["memory"] else "no memory"
    linear = facts["layers"] - len(facts["softmax_layers"])
    note = f" ({linear} with linear attention, which has no attention mass)" if linear else ""
    return f"{facts['family']}, {facts['layers']} layers{note}, {memory}, attention kernel {facts['attention']}"


def _figures(diagnosis: Diagnosis) -> list[str]:
    """What the sentences at the top rest on, in the terms of the field."""
    lines = []
    if diagnosis.causal is not None:
        verdict = diagnosis.causal.verdict
        lines.append(f"{verdict.on('Memory') if diagnosis.model['memory'] else verdict.sentence}.")
    for kind, found in diagnosis.causal_by_type.items():
        lines.append(f"{kind.capitalize()}-term memory only: {found.verdict.sentence}.")
    for written, lead in ((diagnosis.written, ""), (diagnosis.written_off, "Memory off. ")):
        if written is not None and written.decay is not None:
            lines.append(lead + written.decay.sentence)
    return lines
