"""Fills the page's template with a diagnosis."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files
from string import Template

from keepsight.diagnose.report.charts import charts
from keepsight.diagnose.report.latents import invocation_section, probe_section
from keepsight.diagnose.report.overlay import data, layout_of, pictures, tokens, view_choice, views_of
from keepsight.diagnose.report.tables import causal_tables, length_table
from keepsight.diagnose.results import Diagnosis


def render_report(diagnosis: Diagnosis) -> str:
    """The whole page."""
    written = diagnosis.written
    layout = layout_of(written)
    views = views_of(diagnosis, layout)
    facts = diagnosis.model
    fields = {
        "title": escape(str(facts["name"])),
        "facts": escape(_facts(diagnosis)),
        "verdict": _verdict(diagnosis),
        "notes": "".join(f'<p class="card">{escape(note)}</p>' for note in diagnosis.notes),
        "how": escape(_how(diagnosis, bool(views))),
        "views": view_choice(views),
        "items": pictures(diagnosis, layout),
        "about": "" if written is not None else "Nothing was written.",
        "tokens": tokens(written),
        "charts": charts(diagnosis),
        "causal": causal_tables(diagnosis.causal),
        "invocations": invocation_section(diagnosis.invocations),
        "probe": probe_section(diagnosis.probes),
        "lengths": length_table(diagnosis.lengths),
        "reading": _reading(diagnosis),
        "footer": escape(
            f"keepsight {facts['keepsight']}, transformers {facts['transformers']}, torch {facts['torch']}, "
            f"{facts['device']}, {facts['dtype']}; {diagnosis.seconds:.0f} s. All figures are in results.json."
        ),
        "data": json.dumps(data(diagnosis, views, layout), allow_nan=False).replace("<", "\\u003c"),
    }
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(fields)


def _facts(diagnosis: Diagnosis) -> str:
    facts = diagnosis.model
    at = ", ".join(map(str, facts["memory_layers"]))
    latents = ", ".join(f"{n} {kind}" for kind, n in facts["memory_latents"].items())
    where = f" at layers {at}" if at else f" of {latents} latents" if latents else ""
    memory = f"{facts['memory']}{where}" if facts["memory"] else "no memory"
    linear = facts["layers"] - len(facts["softmax_layers"])
    note = f" ({linear} with linear attention, which has no attention mass)" if linear else ""
    return f"{facts['family']}, {facts['layers']} layers{note}, {memory}, attention kernel {facts['attention']}"


def _verdict(diagnosis: Diagnosis) -> str:
    parts = []
    if diagnosis.causal is not None:
        verdict = diagnosis.causal.verdict
        kind = {"used": "used", "barely used": "barely", "not used": "not"}.get(verdict.word, "none")
        detail = verdict.sentence.partition(": ")[2]
        lead = "Memory: " if diagnosis.model["memory"] else ""
        parts.append(
            f'<div class="card verdict {kind}"><strong>{lead}{escape(verdict.word)}</strong>'
            f"<p>{escape(detail)}.</p></div>"
        )
    for kind, found in diagnosis.causal_by_type.items():
        parts.append(f'<p class="card">{kind.capitalize()}-term memory only: {escape(found.verdict.sentence)}.</p>')
    for written, lead in ((diagnosis.written, ""), (diagnosis.written_off, "Memory off. ")):
        if written is not None and written.decay is not None:
            parts.append(f'<p class="card">{lead}{escape(written.decay.sentence)}</p>')
    return "".join(parts)


def _how(diagnosis: Diagnosis, overlay: bool) -> str:
    text = f'Prompt: "{diagnosis.prompt}". '
    if not overlay:
        return text + "There is nothing to lay over an image."
    what = (
        "what the memory retrieved for it" if diagnosis.retrieval is not None else "which parts the model attended to"
    )
    return (
        text
        + f"Point at a token, tap it, or walk with the arrow keys: the image shows {what}, the bar how much the model "
        "looked. A click pins a token. The deeper a token's colour, the more the model looked when it wrote it."
        + (
            " A diamond is a memory: pointing at it shows where its latents looked while they were formed."
            if diagnosis.written is not None and diagnosis.written.memories
            else ""
        )
    )


def _reading(diagnosis: Diagnosis) -> str:
    lines = [
        "<b>A falling curve is no proof of harm.</b> Any softmax over a growing text gives the image less and less; an "
        "untrained model has nearly the same slope, and so have models that still answer well. Read it beside the "
        "scores.",
        "<b>Attention sinks</b> are drawn apart: the first token collects attention that means nothing, and vision "
        "encoders put theirs at image borders. The border curve only says something where it exceeds the border's "
        "share of tokens.",
    ]
    if diagnosis.model["memory"]:
        lines.append(
            "<b>The verdict rests on right image against other image</b>, not on switching the memory off: a random "
            "block also changes outputs, but helps no more with the right image than with a wrong one."
        )
    if diagnosis.probes:
        lines.append(
            "<b>A linear probe finds what is there, not what is used.</b> That is what the table of tampering is for; "
            "and a fact that the text states hold too did not need the memory."
        )
    lines.append("Intervals are 95 % bootstrap intervals; few samples give wide ones.")
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"
