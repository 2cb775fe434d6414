"""The tables of the causal battery and of the score by length."""

from __future__ import annotations

from typing import Any

from keepsight.diagnose.battery.lengths import LengthResult
from keepsight.diagnose.battery.verdict import CausalResult
from keepsight.diagnose.report.sections import Chart, ReportTable, Section, TableCell
from keepsight.diagnose.report.svg import Whisker, interval_chart
from keepsight.words import counted, listed


def causal_sections(causal: CausalResult | None) -> list[Section]:
    """What tampering changed, and what a change half-way changed."""
    if causal is None:
        return []
    return [*_tampering(causal), *_half_way(causal)]


def causal_chart(causal: CausalResult | None) -> Chart | None:
    """The difference that each change makes."""
    if causal is None or not causal.conditions:
        return None
    rows = [
        Whisker(c.name, found.value, found.low, found.high, 0)
        for c in causal.conditions
        for found in [c.score or c.content or c.logprob]
    ]
    scored = causal.conditions[0].score is not None
    what = "task score" if scored else "log-probability per token of text written without it"
    return Chart("", interval_chart(rows, f"difference in {what}; left of 0 is worse", "What each change makes"))


def _tampering(causal: CausalResult) -> list[Section]:
    if not causal.conditions:
        return []
    scored = any(c.score is not None for c in causal.conditions)
    titles = (
        ["change", "task score", "log-prob. per token"]
        if scored
        else ["change", "log-prob. of its own answer", "log-prob. of text written without it", "answer changed"]
    )
    rows = [
        (c.name, c.what, [c.score, c.logprob] if scored else [c.logprob, c.content, c.changed])
        for c in causal.conditions
    ]
    intact = f"Intact, the score is {causal.intact_score.value:.3f}. " if causal.intact_score is not None else ""
    if causal.formed:
        counts = listed([f"{n:,} {kind}" for kind, n in causal.formed.items()])
        intact += f"Memories stand at the same places of the same texts in every reading ({counts} in all). "
    notes = [
        f"{intact}Paired differences to the intact memory over {counted(causal.samples, 'sample')} with 95 % bootstrap "
        f"intervals over {causal.units}; below 0 is worse."
    ]
    if causal.blind is not None:
        blind = TableCell.of(causal.blind)
        notes.append(
            "While the model itself sees another image, a memory of the right one instead of that one changes the "
            f"log-probability of text written without it by {blind.text} ({blind.small}) per token. The verdict "
            "averages this with the same contrast while the model sees the right image."
        )
    chart = causal_chart(causal)
    charts = [chart] if chart is not None else []
    return [Section("What happens without the right memory", notes, (), charts, ReportTable.of(titles, rows))]


def _half_way(causal: CausalResult) -> list[Section]:
    if not causal.half_way:
        return []
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
    note = (
        "The text written so far is kept and read again with the new image; answers in the second half are compared "
        "with both images. Log-probabilities are differences to the unchanged image."
    )
    return [Section("When the image changes half-way", [note], table=ReportTable.of(titles, rows))]


def length_sections(lengths: LengthResult | None) -> list[Section]:
    """Quartiles of length."""
    if lengths is None:
        return []
    methods = list(lengths.quartiles[0].accuracy)
    gain = lengths.quartiles[0].gain is not None
    titles = ["output length", *methods, *(["gain", "relative gain"] if gain else [])]
    rows = []
    for q in lengths.quartiles:
        relative = "-" if q.relative_gain is None else f"{100 * q.relative_gain:+.1f} %"
        cells: list[Any] = [*(q.accuracy[m] for m in methods), *([q.gain, relative] if gain else [])]
        span = counted(q.longest, "token")
        rows.append((span if q.shortest == q.longest else f"{q.shortest:,} to {span}", "", cells))
    note = f"Quartiles of all answers; replies were {lengths.how}."
    return [Section("Score by length of output", [note], table=ReportTable.of(titles, rows))]
