"""The sections about VisMem: where memories are invoked, what follows them, what their latents hold."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from keepsight.diagnose.battery.invocations import AFTER, SOON, InvocationResult
from keepsight.diagnose.battery.probe_results import LatentProbe
from keepsight.diagnose.report.svg import Line, heat_map, line_chart
from keepsight.diagnose.report.tables import table

COLUMNS = 128  # visual tokens (or groups of them) in a map
COLOUR = {"short": 0, "long": 1}


def invocation_section(found: InvocationResult | None) -> str:
    """Ratio by relative position, per data set, and what followed."""
    if found is None:
        return ""
    parts = [f"<h2>When memory is invoked</h2><p class=soft>{escape(found.sentence)}</p>"]
    if found.full:
        parts.append(
            f"<p class=soft>{100 * found.full:.0f} % of the outputs used up all invocations that they may have; "
            "what would have come later is not known.</p>"
        )
    charts = []
    for name, counted in found.datasets.items():
        middle = np.arange(len(counted.ratio["short"])) * 10.0 + 5
        lines = [
            Line(middle, np.array([e.value for e in counted.ratio[kind]]), f"{kind}-term memory", COLOUR[kind])
            for kind in counted.ratio
        ]
        chart = line_chart(
            lines, "place in the output, %", "share of outputs that invoke", f"Invocations along outputs: {name}"
        )
        charts.append(
            f"<div><h3>{escape(name)}: {counted.outputs} outputs of {counted.length:.0f} tokens</h3>{chart}</div>"
        )
    parts.append(f'<div class="charts">{"".join(charts)}</div>')
    if found.effects:
        rows: list[tuple[str, str, list[Any]]] = []
        for kind, effect in found.effects.items():
            until = "-" if effect.until is None else f"{effect.until:.0f}"
            cells = [effect.memories, effect.logprob, until, f"{100 * effect.loops:.0f} %", effect.repeats]
            rows.append((f"{kind}-term memory", "", cells))
        rows.append(
            (
                "elsewhere",
                "no memory within 32 tokens; often later in the text",
                ["-", "-", "-", "-", found.repeats_elsewhere],
            )
        )
        titles = [
            "after a",
            "memories",
            f"log-prob. of the next {AFTER} tokens",
            "tokens to the next memory (median)",
            f"another within {SOON} tokens (a loop)",
            "repeats itself",
        ]
        parts.append(
            "<h3>What followed</h3><p class=soft>The change in log-probability is that of the output's own next "
            "tokens, with the memory minus with it taken out. Text favours the memory that it was written with, so "
            "this is an upper bound; the verdict does not rest on it. Repetition is the share of 4-grams in the next "
            "32 tokens that stand already in the 64 before.</p>" + table(titles, rows)
        )
    if found.followed:
        rows = [
            (
                f"output {f.output + 1}, after {f.memory.place} of {f.length} tokens",
                f"{f.memory.kind}-term, " + ("the model's own choice" if f.memory.chosen else "the policy's choice"),
                [f.words, "-" if f.logprob is None else f"{f.logprob:+.3f}"],
            )
            for f in found.followed
        ]
        listing = table(["memory", "words after it", "log-prob. per token"], rows)
        parts.append(f"<details><summary>{len(rows)} memories one by one</summary>{listing}</details>")
    return "".join(parts)


def probe_section(probes: list[LatentProbe]) -> str:
    """What the latents of each type hold."""
    if not probes:
        return ""
    parts = [
        "<h2>What the latents hold</h2><p class=soft>Memories of one type, formed for many images after the same text, "
        "so that only the image differs.</p>"
    ]
    for probe in probes:
        lines = "".join(f"<li>{escape(line)}</li>" for line in probe.sentences)
        parts.append(f"<h3>{probe.kind.capitalize()}-term memory, {probe.images} images</h3><ul>{lines}</ul>")
        if probe.facts:
            titles = [
                "fact",
                "from the latents",
                "shuffled labels",
                "from visual states",
                "from text states",
                "majority",
            ]
            rows = [
                (
                    fact.name,
                    f"{fact.classes} classes",
                    [fact.latents, fact.shuffled, fact.visual, fact.text, f"{fact.majority:.3f}"],
                )
                for fact in probe.facts
            ]
            parts.append(table(titles, rows))
        words: list[tuple[str, str, list[Any]]] = [
            (f"latent {i}", "", [", ".join(f"{word or 'blank'} ({cosine:.2f})" for word, cosine in nearest)])
            for i, nearest in enumerate(probe.words)
        ]
        listing = table(["of the mean over images", "nearest words (cosine)"], words)
        parts.append(f"<details><summary>nearest words of each latent</summary>{listing}</details>")
        where = None if probe.forming is None else probe.forming.where
        if where is not None and where.shape[1]:
            groups = np.array_split(np.arange(where.shape[1]), min(COLUMNS, where.shape[1]))
            values = np.stack([where[:, group].sum(1) for group in groups], 1)
            columns = np.array([group[0] for group in groups])
            names = [f"latent {i}" for i in range(len(where))]
            chart = heat_map(values, names, columns, "visual token", f"Where {probe.kind} latents look when formed")
            parts.append(
                f'<div class="charts"><div>{chart}<p class=soft>Where each latent looks while it is formed (first '
                f"image; strongest cell {100 * values.max():.1f} % of its attention).</p></div></div>"
            )
    return "".join(parts)
