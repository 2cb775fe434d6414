"""The tables of the page."""

from __future__ import annotations

from html import escape
from typing import Any

from keepsight.diagnose.battery.lengths import LengthResult
from keepsight.diagnose.battery.verdict import CausalResult
from keepsight.diagnose.statistics import Estimate


def causal_tables(causal: CausalResult | None) -> str:
    """What tampering changed, and what a change half-way changed."""
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
        counts = " and ".join(f"{n} {kind}" for kind, n in causal.formed.items())
        formed = f"Memories stand at the same places of the same texts in every reading ({counts} in all). "
        intact += formed if causal.formed else ""
        parts.append(
            f"<h2>What happens without the right memory</h2><p class=soft>{intact}Paired differences to the intact "
            f"memory over "
            f"{causal.samples} samples with 95 % bootstrap intervals over {escape(causal.units)}; below 0 is worse.</p>"
            + table(titles, rows)
        )
        if causal.blind is not None:
            parts.append(
                "<p class=soft>While the model itself sees another image, a memory of the right one instead of that "
                f"one changes the log-probability of text written without it by {cell(causal.blind)} per token. The "
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
            "unchanged image.</p>" + table(titles, rows)
        )
    return "".join(parts)


def length_table(lengths: LengthResult | None) -> str:
    """Quartiles of length."""
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
        f"<p class=soft>Quartiles of all answers; replies were {escape(lengths.how)}.</p>" + table(titles, rows)
    )


def table(titles: list[str], rows: list[tuple[str, str, list[Any]]]) -> str:
    """A table with a name and an explanation at the head of every row."""
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}<br><small>{escape(what)}</small></th>"
        + "".join(f"<td class=n>{cell(value)}</td>" for value in cells)
        + "</tr>"
        for name, what, cells in rows
    )
    return f'<div class="card wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def cell(value: Any) -> str:
    """A value; an estimate with its interval."""
    if value is None:
        return "-"
    if isinstance(value, Estimate):
        if value.n < 2:
            return f"{value.value:.3f} <small>one sample, no interval</small>"
        return f"{value.value:.3f} <small>{value.low:.3f} to {value.high:.3f}</small>"
    return escape(str(value))
