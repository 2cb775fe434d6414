"""Fills the page's template with a diagnosis."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from keepsight.diagnose.layout import VisualLayout
from keepsight.diagnose.lengths import LengthResult
from keepsight.diagnose.report.svg import Line, heat_map, line_chart
from keepsight.diagnose.results import Diagnosis, Written
from keepsight.diagnose.statistics import Estimate
from keepsight.diagnose.verdict import CausalResult

PICTURE = 640  # longest side of an embedded picture, in pixels
BINS = 96  # columns of the layer-by-time map


def render_report(diagnosis: Diagnosis) -> str:
    """The whole page."""
    written = diagnosis.written
    layout = _layout(written)
    views = _views(diagnosis, layout)
    facts = diagnosis.model
    fields = {
        "title": escape(str(facts["name"])),
        "facts": escape(_facts(diagnosis)),
        "verdict": _verdict(diagnosis),
        "notes": "".join(f'<p class="card">{escape(note)}</p>' for note in diagnosis.notes),
        "how": escape(_how(diagnosis, bool(views))),
        "views": _view_choice(views),
        "items": _items(diagnosis, layout),
        "about": "" if written is not None else "Nothing was written.",
        "tokens": _tokens(written),
        "charts": _charts(diagnosis),
        "causal": _causal(diagnosis.causal),
        "lengths": _lengths(diagnosis.lengths),
        "reading": _reading(diagnosis),
        "footer": escape(
            f"keepsight {facts['keepsight']}, transformers {facts['transformers']}, torch {facts['torch']}, "
            f"{facts['device']}, {facts['dtype']}; {diagnosis.seconds:.0f} s. All figures are in results.json."
        ),
        "data": json.dumps(_data(diagnosis, views, layout), allow_nan=False).replace("<", "\\u003c"),
    }
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(fields)


# -- text and overlay -------------------------------------------------------------------------------------------------
def _layout(written: Written | None) -> VisualLayout | None:
    if written is None or not written.attention or not written.attention[0].layouts:
        return None
    layout = written.attention[0].layouts[0]
    return layout if len(layout.slots) else None


def _views(diagnosis: Diagnosis, layout: VisualLayout | None) -> list[dict[str, Any]]:
    """What can be laid over the image: (name, verb, weights [S, cells])."""
    written = diagnosis.written
    if written is None or layout is None:
        return []
    views = []
    retrieval = diagnosis.retrieval
    if retrieval is not None:
        rows = [("the memory", retrieval.weights.mean(1))]
        if len(retrieval.layers) > 1:
            rows += [(f"memory at layer {i}", retrieval.weights[:, k]) for k, i in enumerate(retrieval.layers)]
        views += [_view(name, "retrieved:", weights, layout) for name, weights in rows]
    where = written.attention[0].where
    if where is not None and where.shape[1] == len(layout.slots):
        share = where / np.maximum(where.sum(1, keepdims=True), 1e-30)
        views.append(_view("the model's own attention", "its own attention:", share, layout))
    return views


def _view(name: str, verb: str, weights: np.ndarray, layout: VisualLayout) -> dict[str, Any]:
    cells = np.concatenate([grid.reshape(len(weights), -1) for grid in layout.maps(weights)], 1)
    peak = weights.max(1)
    scale = np.maximum(cells.max(1, keepdims=True, initial=0), 1e-30)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(weights > 0, weights * np.log(weights), 0).sum(1)
    return {
        "name": name,
        "verb": verb,
        "weights": base64.b64encode((cells / scale * 255).round().astype(np.uint8).tobytes()).decode(),
        "peak": [round(100 * float(p), 1) for p in peak],
        "spread": [round(float(np.exp(e)), 1) for e in entropy],
    }


def _view_choice(views: list[dict[str, Any]]) -> str:
    if len(views) < 2:
        return ""
    options = "".join(
        f'<label><input type="radio" name="view" value="{i}"{" checked" if i == 0 else ""}> '
        f"{escape(view['name'])}</label>"
        for i, view in enumerate(views)
    )
    return f"<fieldset><legend>show over the image</legend>{options}</fieldset>"


def _items(diagnosis: Diagnosis, layout: VisualLayout | None) -> str:
    """One figure per image and per video frame, each with a canvas of the grid's size."""
    if not diagnosis.images:
        return '<p class="soft">The prompt has no image.</p>'
    figures = []
    for index, picture in enumerate(diagnosis.images):
        item = layout.items[index] if layout is not None and index < len(layout.items) else None
        frames = picture if isinstance(picture, list) else [picture]
        count = item.frames if item is not None else 1
        for frame in range(count):
            image = frames[min(len(frames) - 1, frame * len(frames) // count)]
            known = item is not None and item.height > 0
            canvas = (
                f'<canvas width="{item.width}" height="{item.height}"></canvas>' if known and item is not None else ""
            )
            name = f"image {index + 1}" if not isinstance(picture, list) else f"video {index + 1}, part {frame + 1}"
            what = f"{image.width}x{image.height} pixels"
            what += f", {item.height}x{item.width} visual tokens" if known and item is not None else ""
            what += "" if known else ", no grid of visual tokens known"
            figures.append(
                f'<figure><div class="pic"><img alt="{name}" {"class=tiny " if max(image.size) < 128 else ""}'
                f'width="{image.width}" height="{image.height}" src="{_picture(image)}">{canvas}</div>'
                f"<figcaption>{name}: {what}</figcaption></figure>"
            )
    return "".join(figures)


def _picture(image: Any) -> str:
    shrunk = image.convert("RGB")
    shrunk.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    small = shrunk.width * shrunk.height <= 128 * 128
    shrunk.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tokens(written: Written | None) -> str:
    if written is None:
        return ""
    mass = _mass(written)
    shade = np.zeros(len(written.words))
    if mass.size and np.nanmax(mass) > 0:
        log = np.log(np.maximum(mass, 1e-9))
        low, high = np.log(max(np.nanmin(mass[mass > 0]), 1e-4)), log.max()
        shade = np.clip((log[_steps(written)] - low) / max(high - low, 1e-9), 0, 1)
    parts = []
    for i, word in enumerate(written.words):
        shown = escape(word).replace("\n", "\u23ce\n")
        parts.append(
            f'<span class="tok" role="option" aria-selected="false" id="t{i}" '
            f'style="background:rgba(var(--hot),{0.45 * shade[i]:.2f})">{shown or "&#8203;"}</span>'
        )
    return "".join(parts)


def _mass(written: Written) -> np.ndarray:
    """Mean over layers and heads [S] of the first trace's first row."""
    return written.attention[0].mass[:, :, 0].mean((1, 2))


def _steps(written: Written) -> np.ndarray:
    """For every token, the measured step that belongs to it [n] (the last one before it)."""
    steps = written.attention[0].steps
    return np.clip(np.searchsorted(steps, written.slots, "right") - 1, 0, len(steps) - 1)


def _data(diagnosis: Diagnosis, views: list[dict[str, Any]], layout: VisualLayout | None) -> dict[str, Any]:
    written, off = diagnosis.written, diagnosis.written_off
    if written is None:
        return {"views": [], "step": [], "mass": [], "off": [], "cells": 0, "visual": 0, "most": 0}
    mass = _mass(written)
    has_mass = layout is not None
    return {
        "views": views,
        "cells": sum(item.frames * item.height * item.width for item in layout.items) if layout is not None else 0,
        "visual": len(layout.slots) if layout is not None else 0,
        "step": _steps(written).tolist(),
        "mass": [round(float(m), 5) if has_mass else None for m in mass],
        "off": [round(float(m), 5) for m in _mass(off)] if off is not None and has_mass else [],
        "most": round(float(mass.max()), 5),
    }


# -- findings ---------------------------------------------------------------------------------------------------------
def _facts(diagnosis: Diagnosis) -> str:
    facts = diagnosis.model
    at = ", ".join(map(str, facts["memory_layers"]))
    memory = f"{facts['memory']} at layers {at}" if facts["memory"] else "no memory"
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
    )


def _charts(diagnosis: Diagnosis) -> str:
    parts = []
    curves = []
    for written, name, colour in ((diagnosis.written, "as it is", 0), (diagnosis.written_off, "memory off", 1)):
        if written is None or written.decay is None:
            continue
        trace = written.attention[0]
        text = trace.text_tokens[:, 0].astype(float)
        curves.append(Line(*_thin(text, _mass(written)), name, colour))
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


def _causal(causal: CausalResult | None) -> str:
    if causal is None:
        return ""
    parts = []
    if causal.conditions:
        scored = any(c.score is not None for c in causal.conditions)
        titles = (
            ["change", "task score", "log-prob. per token"]
            if scored
            else ["change", "log-prob. of its own answer", "log-prob. of text written without it", "answer changed"]
        )
        rows = []
        for c in causal.conditions:
            cells = [c.score, c.logprob] if scored else [c.logprob, c.content, c.changed]
            rows.append((c.name, c.what, cells))
        intact = f"Intact, the score is {causal.intact_score.value:.3f}. " if causal.intact_score is not None else ""
        parts.append(
            f"<h2>What happens without the right memory</h2><p class=soft>{intact}Paired differences to the intact "
            f"memory over "
            f"{causal.samples} samples with 95 % bootstrap intervals over {escape(causal.units)}; below 0 is worse.</p>"
            + _table(titles, rows)
        )
        if causal.blind is not None:
            parts.append(
                "<p class=soft>While the model itself sees another image, a memory of the right one instead of that "
                f"one changes the log-probability of text written without it by {_cell(causal.blind)} per token. The "
                "verdict averages this with the same contrast while the model sees the right image.</p>"
            )
    if causal.half_way:
        scored = any(h.follows is not None for h in causal.half_way)
        titles = [
            "change half-way",
            *(["right for the first image", "right for the new image"] if scored else []),
            "log-prob. per token",
            *([] if scored else ["second half changed"]),
        ]
        rows = [
            (h.name, h.what, [*([h.stays, h.follows] if scored else []), h.logprob, *([] if scored else [h.changed])])
            for h in causal.half_way
        ]
        parts.append(
            "<h2>When the image changes half-way</h2><p class=soft>The text written so far is kept and read again "
            "with the new "
            "image; answers in the second half are compared with both images. Log-probabilities are differences to the "
            "unchanged image.</p>" + _table(titles, rows)
        )
    return "".join(parts)


def _lengths(lengths: LengthResult | None) -> str:
    if lengths is None:
        return ""
    methods = list(lengths.quartiles[0].accuracy)
    gain = lengths.quartiles[0].gain is not None
    titles = ["output length", *methods, *(["gain", "relative gain"] if gain else [])]
    rows = []
    for q in lengths.quartiles:
        relative = "-" if q.relative_gain is None else f"{100 * q.relative_gain:+.1f} %"
        cells: list[Any] = [*(q.accuracy[m] for m in methods), *([q.gain, relative] if gain else [])]
        rows.append((f"{q.shortest:,} to {q.longest:,}", "tokens", cells))
    return (
        "<h2>Score by length of output</h2>"
        f"<p class=soft>Quartiles of all answers; replies were {escape(lengths.how)}.</p>" + _table(titles, rows)
    )


def _table(titles: list[str], rows: list[tuple[str, str, list[Any]]]) -> str:
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}<br><small>{escape(what)}</small></th>"
        + "".join(f"<td class=n>{_cell(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, what, cells in rows
    )
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        if value.n < 2:
            return f"{value.value:.3f} <small>one sample, no interval</small>"
        return f"{value.value:.3f} <small>{value.low:.3f} to {value.high:.3f}</small>"
    return escape(str(value))


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
    lines.append("Intervals are 95 % bootstrap intervals; few samples give wide ones.")
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"
