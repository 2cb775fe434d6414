"""The findings in plain sentences, for readers who know none of the terms; every number was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from keepsight.diagnose.battery.verdict import CausalResult
from keepsight.diagnose.report.overlay import mass_of
from keepsight.diagnose.results import Diagnosis, Written
from keepsight.words import counted, listed

OPEN = 0.05  # a gate that is smaller lets next to nothing of its branch through


@dataclass(frozen=True)
class Plain:
    """A sentence, and how it is to be taken: "good", "bad", "mid" or ""."""

    text: str
    tone: str = ""


def opening(diagnosis: Diagnosis) -> list[Plain]:
    """The findings, the most important first."""
    found = [*_use(diagnosis.causal), *_training(diagnosis)]
    if diagnosis.written is not None:
        found += _looking(diagnosis.written)
    found += _scores(diagnosis)
    if diagnosis.invocations is not None:
        found.append(Plain(diagnosis.invocations.sentence))
    return found


def _use(causal: CausalResult | None) -> list[Plain]:
    if causal is None:
        return []
    verdict = causal.verdict
    if verdict.word == "no memory attached":
        return [
            Plain("This model carries no memory, so there is none to test. Below stands what the model does by itself.")
        ]
    if verdict.figure is None:
        return [Plain(f"Whether your memory is used cannot be said: {verdict.rule}.", "mid")]
    lead = f"Your memory is {verdict.word}"
    tone = {"used": "good", "barely used": "mid"}.get(verdict.word, "bad")
    return [Plain(f"{lead}: {_evidence(causal)}.", tone)]


def _evidence(causal: CausalResult) -> str:
    """What the verdict rests on, in words."""
    figure, used = causal.verdict.figure, causal.verdict.word != "not used"
    assert figure is not None
    other = next((c for c in causal.conditions if c.name == "other image"), None)
    swapped = next((h for h in causal.half_way if h.name == "memory swapped"), None)
    if other is not None and other.score is not None:
        lost = f"{100 * figure.value:.0f} more of 100 answers are wrong"
        if not used:
            lost = "the answers are as good as with the right one, as far as could be told"
        if used and swapped is not None and swapped.follows is not None:
            follow = f"answers change to that image in {100 * swapped.follows.value:.0f} of 100 cases"
            return f"with another image in it, {follow}, and {lost} than with the right one"
        return f"with another image in it, {lost}"
    more = 100 * (math.exp(figure.value) - 1)
    text = f"with the right image in it instead of another, the words that fit the image are {abs(more):.1f} % "
    text += "likelier" if more >= 0 else "less likely"
    if not used:
        text += ", which may be chance"
    if other is not None and other.changed is not None:
        text += f"; with the other image {100 * other.changed.value:.0f} of 100 words of the answer change"
    return text


def _training(diagnosis: Diagnosis) -> list[Plain]:
    """How long it was trained, and how far its gates have opened."""
    steps, gates = diagnosis.model.get("steps"), list(diagnosis.model.get("gates", {}).values())
    parts = [f"{counted(steps, 'step')} of training"] if steps is not None else []
    if gates:
        shown = list(dict.fromkeys(f"{gate:.2g}" for gate in gates))
        many = f"between {min(gates):.2g} and {max(gates):.2g}" if len(shown) > 4 else f"at {listed(shown)}"
        parts.append(f"gate{'s' if len(gates) > 1 else ''} {many}")
    if not parts:
        return []
    text, word = ", ".join(parts), diagnosis.causal.verdict.word if diagnosis.causal is not None else ""
    if gates and not any(gates):
        return [Plain(f"{text}: it was not trained yet, and changes nothing.", "bad")]
    if word in ("not used", "barely used"):
        if gates and max(map(abs, gates)) < OPEN:
            return [
                Plain(
                    f"{text}: a gate begins at 0, and one so small lets next to nothing through. Train longer.", "mid"
                )
            ]
        return [Plain(f"{text}. Train longer, or with a longer warm-up under the blindfold.", "mid")]
    return [Plain(f"{text[0].upper()}{text[1:]}.")]


def _looking(written: Written) -> list[Plain]:
    """How the share of attention changed from the first tokens to the last."""
    if written.decay is None:
        return []
    mass, few = mass_of(written), max(1, len(mass_of(written)) // 16)
    first, last = float(mass[:few].mean()), float(mass[-few:].mean())
    way = "falls" if last < first else "rises"
    return [
        Plain(
            f"While it writes {counted(len(written.words), 'token')}, the share of its attention that goes to the "
            f"image {way} from {100 * first:.1f} to {100 * last:.1f} %. That alone proves no harm; the answers do."
        )
    ]


def _scores(diagnosis: Diagnosis) -> list[Plain]:
    """Right answers in the shortest and in the longest outputs."""
    if diagnosis.lengths is None:
        return []
    near, far = diagnosis.lengths.quartiles[0], diagnosis.lengths.quartiles[-1]
    if near.longest >= far.shortest:  # most answers are of one length: the quarters do not differ in it
        return []

    def right(method: str) -> tuple[str, str]:
        return f"{100 * near.accuracy[method].value:.0f}", f"{100 * far.accuracy[method].value:.0f}"

    first, last = right("memory" if "memory" in near.accuracy else "base")
    text = (
        f"Of the shortest answers, up to {counted(near.longest, 'token')}, {first} % are right, and of the "
        f"longest, {far.shortest:,} or more, {last} %"
    )
    others = (("base", "with the memory off"), ("control", "of the control"))
    for method, name in others if "memory" in near.accuracy else others[1:]:
        if method in near.accuracy:
            text += f"; {name} {' and '.join(right(method))} %"
    return [Plain(f"{text}.")]
