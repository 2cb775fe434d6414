"""Sections about VisMem: invocations, what follows them, what latents hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from keepsight.diagnose.battery.invocation_results import AFTER, SOON, InvocationResult
from keepsight.diagnose.battery.probe_results import LatentProbe
from keepsight.diagnose.report.sections import Chart, ReportTable, Section
from keepsight.diagnose.report.svg import Line, Whisker, heat_map, interval_chart, line_chart
from keepsight.words import counted

COLUMNS = 128  # visual tokens (or groups of them) in a map
COLOUR = {"short": 0, "long": 1}


def invocation_sections(found: InvocationResult | None) -> list[Section]:
    """Ratio by relative position, per data set, and what followed."""
    if found is None:
        return []
    notes = [found.sentence]
    if found.full:
        notes.append(
            f"{100 * found.full:.0f} % of the outputs used up all invocations that they may have; what would have come "
            "later is not known."
        )
    sections = [Section("When memory is invoked", notes, charts=ratio_charts(found))]
    if found.effects:
        sections.append(_what_followed(found))
    if found.followed:
        sections.append(_one_by_one(found))
    return sections


def ratio_charts(found: InvocationResult | None) -> list[Chart]:
    """Share of outputs that invoke in each tenth of their length, a chart per data set (the paper's figure 5)."""
    charts = []
    for name, counted_there in ({} if found is None else found.datasets).items():
        lines = []
        for kind, ratio in counted_there.ratio.items():
            middle = (np.arange(len(ratio)) + 0.5) * 100 / len(ratio)
            values, band = np.array([e.value for e in ratio]), np.array([[e.low, e.high] for e in ratio]).T
            lines.append(Line(middle, values, f"{kind}-term memory", COLOUR[kind], band=band))
        outputs = counted(counted_there.outputs, "output")
        title = f"{name}: {outputs} of {counted(counted_there.length, 'token')}"
        label = "share of outputs that invoke"
        charts.append(Chart(title, line_chart(lines, "place in the output, %", label, title), lines))
    return charts


def _what_followed(found: InvocationResult) -> Section:
    rows: list[tuple[str, str, list[Any]]] = []
    for kind, effect in found.effects.items():
        until = "-" if effect.until is None else f"{effect.until:.0f}"
        cells = [effect.memories, effect.logprob, until, f"{100 * effect.loops:.0f} %", effect.repeats]
        rows.append((f"{kind}-term memory", "", cells))
    what = "no memory within 32 tokens; often later in the text"
    rows.append(("elsewhere", what, ["-", "-", "-", "-", found.repeats_elsewhere]))
    titles = [
        "after a",
        "memories",
        f"log-prob. of the next {AFTER} tokens",
        "tokens to the next memory (median)",
        f"another within {SOON} tokens (a loop)",
        "repeats itself",
    ]
    note = (
        "The change in log-probability is that of the output's own next tokens, with the memory minus with it taken "
        "out. Text favours the memory that it was written with, so this is an upper bound; the verdict does not rest "
        "on it. Repetition is the share of 4-grams in the next 32 tokens that stand already in the 64 before."
    )
    return Section("What followed", [note], table=ReportTable.of(titles, rows), level=3)


def _one_by_one(found: InvocationResult) -> Section:
    rows = [
        (
            f"output {f.output + 1}, after {f.memory.place} of {counted(f.length, 'token')}",
            f"{f.memory.kind}-term, " + ("the model's own choice" if f.memory.chosen else "the policy's choice"),
            [f.words, "-" if f.logprob is None else f"{f.logprob:+.3f}"],
        )
        for f in found.followed
    ]
    listing = ReportTable.of(["memory", "words after it", "log-prob. per token"], rows)
    return Section(table=listing, folded=f"{counted(len(rows), 'memory', 'memories')} one by one")


def probe_sections(probes: list[LatentProbe]) -> list[Section]:
    """What the latents of each type hold."""
    if not probes:
        return []
    note = "Memories of one type, formed for many images after the same text, so that only the image differs."
    sections = [Section("What the latents hold", [note])]
    for probe in probes:
        title = f"{probe.kind.capitalize()}-term memory, {counted(probe.images, 'image')}"
        charts = [chart for chart in (fact_chart(probe), where_chart(probe)) if chart is not None]
        sections.append(Section(title, items=probe.sentences, charts=charts, table=_facts(probe), level=3))
        rows = [
            (f"latent {i}", "", [", ".join(f"{word or 'blank'} ({cosine:.2f})" for word, cosine in nearest)])
            for i, nearest in enumerate(probe.words)
        ]
        listing = ReportTable.of(["of the mean over images", "nearest words (cosine)"], rows)
        sections.append(Section(table=listing, folded="nearest words of each latent"))
    return sections


def _facts(probe: LatentProbe) -> ReportTable | None:
    titles = ["fact", "from the latents", "shuffled labels", "from visual states", "from text states", "majority"]
    rows = [
        (f.name, counted(f.classes, "class", "classes"), [f.latents, f.shuffled, f.visual, f.text, f"{f.majority:.3f}"])
        for f in probe.facts
    ]
    return ReportTable.of(titles, rows) if rows else None


def fact_chart(probe: LatentProbe) -> Chart | None:
    """What a linear map reads from the latents, and from what they were formed of."""
    read = (("latents", "latents", 0), ("shuffled", "shuffled labels", 3), ("visual", "visual states", 1))
    rows = [
        Whisker(f"{fact.name}: {name}", found.value, found.low, found.high, colour)
        for fact in probe.facts
        for key, name, colour in (*read, ("text", "text states", 2))
        for found in [getattr(fact, key)]
        if found is not None
    ]
    title = f"What a linear map reads from the latents of {probe.kind}-term memory"
    return Chart("", interval_chart(rows, "share of right answers on other images", title)) if rows else None


def where_chart(probe: LatentProbe) -> Chart | None:
    """Where each latent looks while it is formed."""
    where = None if probe.forming is None else probe.forming.where
    if where is None or not where.shape[1]:
        return None
    groups = np.array_split(np.arange(where.shape[1]), min(COLUMNS, where.shape[1]))
    values = np.stack([where[:, group].sum(1) for group in groups], 1)
    edges = np.array([*(group[0] for group in groups), where.shape[1]], float)
    names, title = [f"latent {i}" for i in range(len(where))], f"Where {probe.kind} latents look when formed"
    chart = heat_map(values, names, edges, "visual token", title, "% of its attention", 100)
    return Chart("", chart, note="Where each latent looks while it is formed (first image).")
