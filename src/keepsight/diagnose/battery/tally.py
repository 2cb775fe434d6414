"""Sum up the battery's samples: paired differences with bootstrap intervals, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from keepsight.diagnose.battery.halfway import summarised
from keepsight.diagnose.battery.verdict import (
    ENOUGH_LOGPROB,
    ENOUGH_SCORE,
    CausalResult,
    Condition,
    Verdict,
    verdict_from,
)
from keepsight.diagnose.memories.interface import Plan
from keepsight.diagnose.statistics import Estimate, estimate

BLOCK = 16  # tokens per unit where samples are too few to be the units
FEW = 5  # below so many samples, answers or blocks of tokens are the units

CONDITIONS = {
    "off": "the memory is switched off",
    "zeroed": "its contents are zero",
    "matched noise": "its contents are noise with the same mean and spread",
    "shuffled across samples": "every token of it comes from another sample's image, each from a different one",
    "other image": "it remembers another image",
    "scaled x0.5": "its contents at half size",
    "scaled x2": "its contents at double size",
    "other type": "short-term memory in place of long-term memory and the reverse, at the same places",
}


class Tally:
    """The figures of the samples that are finished.

    Attributes:
        done: how many there are.
        figures: "score", "logprob" and "content" -> condition -> one array per sample.
        changed: condition -> share of the answer's tokens that changed, per sample.
        blind: right image minus other image in the memory, while the decoder sees the other one, per sample.
        half: change half-way -> what was found, per sample.
        formed: type -> memories that stood in the texts.
    """

    def __init__(self) -> None:
        self.done = 0
        self.figures: dict[str, dict[str, list[np.ndarray]]] = {"score": {}, "logprob": {}, "content": {}}
        self.changed: dict[str, list[float]] = {}
        self.blind: list[np.ndarray] = []
        self.half: dict[str, list[dict[str, Any]]] = {}
        self.formed: dict[str, int] = {}

    def add(
        self, rows: dict[str, dict[str, Any]], blind: np.ndarray | None, half: dict[str, dict[str, Any]], plan: Plan
    ) -> None:
        """One more sample: its figures under each condition, and where memories stood in its text."""
        for name, row in rows.items():
            for key, store in self.figures.items():
                if key in row:
                    store.setdefault(name, []).append(np.atleast_1d(row[key]))
            if "changed" in row:
                self.changed.setdefault(name, []).append(float(row["changed"]))
        if blind is not None:
            self.blind.append(blind)
        for name, row in half.items():
            self.half.setdefault(name, []).append(row)
        for _, kind in plan:
            self.formed[kind] = self.formed.get(kind, 0) + 1
        self.done += 1

    def result(self, method: str | None, scored: bool, sees: bool) -> CausalResult:
        """All that was found, and the verdict.

        Args:
            method: of the memory; None if there is none.
            scored: samples have references.
            sees: there is an image to remember.
        """
        few = self.done < FEW
        units = ("answers" if scored else f"blocks of {BLOCK} tokens") if few else "samples"
        intact = self.figures["score"].get("intact", [])
        result = CausalResult(
            method=method,
            units=units,
            samples=self.done,
            intact_score=estimate(_units(intact, few, False)) if intact else None,
            formed=dict(self.formed),
        )

        def paired(figure: str, name: str) -> Estimate | None:
            store = self.figures[figure]
            if name not in store or len(store[name]) != len(store["intact"]):
                return None
            pairs = [a - b for a, b in zip(store[name], store["intact"], strict=True)]
            return estimate(_units(pairs, few, not scored))

        if self.blind:
            result.blind = estimate(_units(self.blind, few, True))
        for name, what in CONDITIONS.items():
            logprob = paired("logprob", name)
            if logprob is None:
                continue
            changed = estimate(np.array(self.changed[name])) if name in self.changed else None
            result.conditions.append(
                Condition(name, what, paired("score", name), logprob, paired("content", name), changed)
            )
        result.half_way = summarised(self.half)
        result.verdict = self._verdict(method, sees, paired("score", "other image"))
        return result

    def _verdict(self, method: str | None, sees: bool, figure: Estimate | None) -> Verdict:
        if method is None:
            return Verdict("no memory attached", None, "", "this model carries no visual memory that is switched on")
        if not sees:
            return Verdict("not enough data", None, "", "no prompt has an image, so there is nothing to remember")
        measure, enough = "of task score", ENOUGH_SCORE
        score, content = self.figures["score"], self.figures["content"]
        if figure is not None:
            if not np.concatenate([*score["intact"], *score["other image"]]).any():
                rule = "no answer is right, whichever image is in memory; ask what the model can answer"
                return Verdict("not enough data", None, "", rule)
            figure = Estimate(0.0 - figure.value, 0.0 - figure.high, 0.0 - figure.low, figure.n)  # 0, never -0
        elif self.blind:
            measure, enough = "nats per token of text written without the memory", ENOUGH_LOGPROB
            sighted = [a - b for a, b in zip(content["intact"], content["other image"], strict=True)]
            both = [(a + b) / 2 for a, b in zip(sighted, self.blind, strict=True)]
            figure = estimate(_units(both, self.done < FEW, True))
        if figure is None or figure.n < 3:
            n = 0 if figure is None else figure.n
            return Verdict("not enough data", None, "", f"{n} units were measured; an interval needs 3 or more")
        return verdict_from(figure, measure, enough)


def _units(rows: Sequence[np.ndarray], few: bool, blocks: bool) -> np.ndarray:
    """Rows of values as units: one mean per row, or, of few rows, their values or blocks of their values."""
    if not few:
        return np.array([row.mean() for row in rows])
    if not blocks:
        return np.concatenate(rows)
    return np.concatenate([[part.mean() for part in np.array_split(row, max(1, len(row) // BLOCK))] for row in rows])
