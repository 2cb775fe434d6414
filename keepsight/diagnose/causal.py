"""Is the memory used? Take it away, spoil it, exchange it, and see what changes.

The verdict rests on one contrast: the memory of the *right* image against that of *another* image, everything else
equal. Switching a memory off shows that it does something; only the contrast shows that what it remembers matters. A
random, untrained block changes outputs too, but it helps no more with the right image than with a wrong one.

What is compared: the task score where there are references. Where there are none, the log-probability of text that was
written *without* the memory. Text written with it would favour it unfairly: a text is by construction likely under the
very contents that it was written with, also where these are noise. That text is read twice, while the decoder itself
sees the right image and while it sees the other one, and the two contrasts are averaged: in short outputs a decoder
that sees the right image needs no memory, and a memory that could tell it everything would seem useless.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from keepsight.diagnose.cases import Case, Reader, Sample, stand_in_images, without_images
from keepsight.diagnose.memories import (
    Memory,
    matched_noise,
    memory_of,
    mixed_from,
    remembered,
    scaled,
    taken_from,
    zeroed,
)
from keepsight.diagnose.statistics import Estimate, estimate

#: Smallest contrast that counts as "used" rather than "barely used".
ENOUGH_SCORE = 0.05
ENOUGH_LOGPROB = 0.02  # nats per token
DONORS = 3
BLOCK = 16  # tokens per unit where samples are too few to be the units
FEW = 5  # below so many samples, answers or blocks of tokens are the units

CONDITIONS = {
    "off": "the memory is switched off",
    "zeroed": "its contents are zero",
    "matched noise": "its contents are noise with the same mean and spread",
    "shuffled across samples": "every visual token comes from another sample's image, each from a different one",
    "other image": "it remembers another image",
    "scaled x0.5": "its contents at half size",
    "scaled x2": "its contents at double size",
}


@dataclass(frozen=True)
class Condition:
    """What one change did, as paired differences to the intact memory (negative: worse than intact).

    Attributes:
        name, what: the change.
        score: difference in task score (share of right answers); None without references.
        logprob: difference in log-probability per token, of the references or else of the model's own answer.
        content: difference in log-probability per token of text written without the memory; None with references.
        changed: share of the answer's tokens that change when the model answers again; None with references.
    """

    name: str
    what: str
    score: Estimate | None
    logprob: Estimate
    content: Estimate | None = None
    changed: Estimate | None = None


@dataclass(frozen=True)
class HalfWay:
    """What happened after the image changed half-way through an output.

    Attributes:
        name, what: the change.
        stays: share of later answers that are right for the first image; None without references.
        follows: share of later answers that are right for the new image; None without references.
        logprob: difference in log-probability per token of the second half, to the unchanged image.
        changed: share of the second half's tokens that change when the model writes it again; None with references.
    """

    name: str
    what: str
    stays: Estimate | None
    follows: Estimate | None
    logprob: Estimate
    changed: Estimate | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether the memory is used, in words.

    Attributes:
        word: "used", "barely used", "not used", "no memory attached" or "not enough data".
        figure: the contrast right image minus other image; None where there is none.
        measure: what `figure` is measured in.
        rule: how the word follows from the figure.
    """

    word: str
    figure: Estimate | None
    measure: str
    rule: str

    @property
    def sentence(self) -> str:
        """The verdict in one line, with the figure it rests on."""
        if self.figure is None:
            return f"{self.word}: {self.rule}"
        return f"{self.word}: right image minus other image = {self.figure} {self.measure} ({self.rule})"


@dataclass
class CausalResult:
    """All of the battery.

    Attributes:
        method: the memory's method, or None.
        units: what the intervals resample: samples, answers, or blocks of tokens.
        samples: how many samples were measured.
        intact_score: the task score with the memory intact.
        blind: without references: right image minus other image in the memory, in nats per token of text written
            without the memory, while the decoder itself sees the other image.
        conditions, half_way, verdict: the findings.
    """

    method: str | None
    units: str
    samples: int
    intact_score: Estimate | None
    blind: Estimate | None = None
    conditions: list[Condition] = field(default_factory=list)
    half_way: list[HalfWay] = field(default_factory=list)
    verdict: Verdict = field(default_factory=lambda: Verdict("not enough data", None, "", "nothing was measured"))


class Battery:
    """Measures case by case, so that it can be stopped at any time; `result()` says what is known so far.

    Args:
        reader: the model, with or without a memory.
        cases: with references (`Reader.case`, `lab_cases`), all of them or none.
        samples: without references; give either these or `cases`.
        steps: tokens that the model writes per sample where there are no references.
        seed: of noise and choices.
    """

    def __init__(
        self,
        reader: Reader,
        cases: Sequence[Case] = (),
        samples: Sequence[Sample] = (),
        steps: int = 128,
        seed: int = 0,
    ):
        assert bool(cases) != bool(samples), "either cases with references or samples without"
        self.reader, self.cases, self.steps, self.seed = reader, list(cases), steps, seed
        self.samples = [case.sample for case in cases] or list(samples)
        self.memory: Memory | None = memory_of(reader.model)
        self._score: dict[str, list[np.ndarray]] = {}
        self._logprob: dict[str, list[np.ndarray]] = {}
        self._content: dict[str, list[np.ndarray]] = {}
        self._changed: dict[str, list[float]] = {}
        self._blind: list[np.ndarray] = []
        self._half: dict[str, list[dict[str, Any]]] = {}
        self._done = 0
        self._contents: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def run(self) -> Iterator[int]:
        """Measure; yields the number of finished samples after each."""
        for index in range(len(self.samples)):
            self._measure(index)
            self._done += 1
            yield self._done

    # -- one sample -----------------------------------------------------------------------------------------------
    def _measure(self, index: int) -> None:
        sample = self.samples[index]
        inputs = self.reader.inputs(sample)
        rows: dict[str, dict[str, Any]] = {}
        if self.cases:
            case = self.cases[index]
            own = free = case
        else:
            own = _whole(sample, self.reader.write(inputs, self.steps))
            free = own
            if self.memory is not None:
                with self.memory.off():
                    free = _whole(sample, self.reader.write(inputs, self.steps))
        blind: np.ndarray | None = None
        if self.memory is not None and sample.sees:
            others = self._others(index)
            for name, contexts in self._conditions(index, [content for _, content in others]).items():
                results: list[dict[str, Any]] = []
                for context in contexts:
                    with context:
                        # writing again is the slow part, and one of several other images is enough for it
                        results.append(self._read(inputs, own, free, name != "intact" and not results))
                rows[name] = {
                    key: np.mean([r[key] for r in results if r[key] is not None], 0)
                    for key in results[0]
                    if results[0][key] is not None
                }
            if not self.cases:
                blind = self._read_blind(index, others[:DONORS], free)
        half = self._half_way(index, inputs, own) if sample.sees else {}
        # Only now, when the sample is complete, it counts: an interrupted one leaves no unpaired figures.
        for name, row in rows.items():
            for store, key in ((self._score, "score"), (self._logprob, "logprob"), (self._content, "content")):
                if key in row:
                    store.setdefault(name, []).append(np.atleast_1d(row[key]))
            if "changed" in row:
                self._changed.setdefault(name, []).append(float(row["changed"]))
        if blind is not None:
            self._blind.append(blind)
        for name, row in half.items():
            self._half.setdefault(name, []).append(row)

    def _read(self, inputs: dict[str, torch.Tensor], own: Case, free: Case, again: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"score": None, "content": None, "changed": None}
        logp = self.reader.read(inputs, own.text)
        if self.cases:
            right = logp.argmax(-1).cpu() == own.text
            found["score"] = np.array([bool(right[a:b].all()) for a, b in own.scored], float)
        found["logprob"] = _per_answer(logp, own)
        if not self.cases:
            found["content"] = _per_answer(self.reader.read(inputs, free.text), free)
            if again:
                found["changed"] = _difference(own.text, self.reader.write(inputs, len(own.text)))
        return found

    def _conditions(self, index: int, others: list[torch.Tensor]) -> dict[str, list[AbstractContextManager[Any]]]:
        memory = self.memory
        assert memory is not None
        seed = self.seed * 1000 + index
        return {
            "intact": [nullcontext()],
            "off": [memory.off()],
            "zeroed": [memory.changed(zeroed)],
            "matched noise": [memory.changed(matched_noise(seed))],
            "shuffled across samples": [memory.changed(mixed_from(others, seed))],
            "other image": [memory.changed(taken_from(other)) for other in others[:DONORS]],
            "scaled x0.5": [memory.changed(scaled(0.5))],
            "scaled x2": [memory.changed(scaled(2.0))],
        }

    def _read_blind(self, index: int, others: list[tuple[Sample, torch.Tensor]], free: Case) -> np.ndarray:
        """Right image minus other image in the memory [n], while the decoder sees the other image."""
        memory = self.memory
        assert memory is not None
        differences = []
        for other, _ in others:
            inputs = self.reader.inputs(replace(free.sample, images=other.images, videos=other.videos))
            theirs = _per_answer(self.reader.read(inputs, free.text), free)
            with memory.changed(taken_from(self._content_of(index))):
                differences.append(_per_answer(self.reader.read(inputs, free.text), free) - theirs)
        return np.mean(differences, 0)

    def _others(self, index: int) -> list[tuple[Sample, torch.Tensor]]:
        """Other samples with what they leave in the memory, or stand-ins where there are no other samples."""
        found = [
            (self.samples[other], self._content_of(other))
            for step in range(1, min(len(self.samples), 9))
            if self.samples[other := (index + step) % len(self.samples)].sees
        ]
        return found or [(s, self._recorded(s)) for s in _stand_ins(self.samples[index], self.seed)]

    def _content_of(self, index: int) -> torch.Tensor:
        if index not in self._contents:
            self._contents[index] = self._recorded(self.samples[index])
        return self._contents[index]

    def _recorded(self, sample: Sample) -> torch.Tensor:
        assert self.memory is not None
        inputs = self.reader.inputs(sample)
        with remembered(self.memory) as seen:
            self.reader.read(inputs, inputs["input_ids"][0, -1:].cpu())
        return torch.cat(seen, 1)

    # -- half-way -------------------------------------------------------------------------------------------------
    def _half_way(self, index: int, inputs: dict[str, torch.Tensor], own: Case) -> dict[str, dict[str, Any]]:
        cut = len(own.text) // 2
        if cut < 1:
            return {}
        other, images = self._other_case(index)
        new = self.reader.inputs(replace(own.sample, images=images.images, videos=images.videos))
        gone = self.reader.inputs(without_images(own.sample))
        whole = {"unchanged": inputs, "image swapped": new, "image removed": gone}
        found = {}
        intact: torch.Tensor | None = None
        for name, given in whole.items():
            logp = self.reader.read(given, own.text)[cut:]
            intact = logp if intact is None else intact
            found[name] = self._half_row(own, other, cut, logp, intact)
            if not self.cases and name != "unchanged":
                again = self.reader.write(self.reader.with_text(given, own.text[:cut]), len(own.text) - cut)
                found[name]["changed"] = _difference(own.text[cut:], again)
        if self.memory is not None:
            logp = self._read_swapped(inputs, new, own.text, cut)
            assert intact is not None
            found["memory swapped"] = self._half_row(own, other, cut, logp, intact)
        return found

    def _other_case(self, index: int) -> tuple[Case | None, Sample]:
        for step in range(1, len(self.samples)):
            other = (index + step) % len(self.samples)
            if self.samples[other].sees:
                return (self.cases[other] if self.cases else None), self.samples[other]
        return None, _stand_ins(self.samples[index], self.seed)[0]

    @staticmethod
    def _half_row(own: Case, other: Case | None, cut: int, logp: torch.Tensor, intact: torch.Tensor) -> dict[str, Any]:
        text = own.text[cut:].to(logp.device)[:, None]
        row: dict[str, Any] = {"logprob": (logp - intact).gather(1, text).mean().item()}
        new = own.answers_for(other) if other is not None else None
        if new is None:
            return row
        first = logp.argmax(-1).cpu()
        asked = [(a, int(own.text[a]), b) for (a, _), b in zip(own.scored, new, strict=True)]
        asked = [(a, mine, b) for a, mine, b in asked if a >= cut and mine != b]
        if asked:
            row["stays"] = np.mean([int(first[a - cut]) == mine for a, mine, _ in asked])
            row["follows"] = np.mean([int(first[a - cut]) == b for a, _, b in asked])
        return row

    @torch.no_grad()
    def _read_swapped(
        self, inputs: dict[str, torch.Tensor], new: dict[str, torch.Tensor], text: torch.Tensor, cut: int
    ) -> torch.Tensor:
        """Log-probabilities [n - cut, V] of the second half when only the memory in the cache is exchanged."""
        model = self.reader.model
        donor = model(**new, use_cache=True, logits_to_keep=1).past_key_values
        # the new image first: some models keep the position offset of the last prompt that they read
        begun = model(**self.reader.with_text(inputs, text[:cut]), use_cache=True, logits_to_keep=1)
        assert self.memory is not None
        self.memory.swap(begun.past_key_values, donor)
        logits = [begun.logits[0, -1:]]
        rest = text[cut:-1].to(logits[0].device)[None]
        if rest.shape[1]:
            # no attention mask: a single row has no padding, and Qwen would take a mask of all slots for all positions
            out = model(input_ids=rest, past_key_values=begun.past_key_values, use_cache=True)
            logits.append(out.logits[0])
        return torch.cat(logits).float().log_softmax(-1)

    # -- summing up -----------------------------------------------------------------------------------------------
    def result(self) -> CausalResult:
        """What was found in the samples that are finished."""
        few = self._done < FEW
        units = ("answers" if self.cases else f"blocks of {BLOCK} tokens") if few else "samples"
        intact = self._score.get("intact", [])
        result = CausalResult(
            method=self.memory.method if self.memory is not None else None,
            units=units,
            samples=self._done,
            intact_score=estimate(_units(intact, few, False)) if intact else None,
        )

        def difference(store: dict[str, list[np.ndarray]], name: str) -> Estimate | None:
            if name not in store:
                return None
            pairs = [a - b for a, b in zip(store[name], store["intact"], strict=True)]
            return estimate(_units(pairs, few, not self.cases))

        if self._blind:
            result.blind = estimate(_units(self._blind, few, True))
        for name, what in CONDITIONS.items():
            logprob = difference(self._logprob, name)
            if logprob is None:
                continue
            changed = estimate(np.array(self._changed[name])) if name in self._changed else None
            result.conditions.append(
                Condition(name, what, difference(self._score, name), logprob, difference(self._content, name), changed)
            )
        for name, rows in self._half.items():
            columns = {key: np.array([r[key] for r in rows if key in r]) for key in ("stays", "follows", "changed")}
            found = {key: estimate(values) if len(values) else None for key, values in columns.items()}
            logprob = estimate(np.array([r["logprob"] for r in rows]))
            result.half_way.append(HalfWay(name, _HALF_WAY[name], logprob=logprob, **found))
        result.verdict = self._verdict(difference)
        return result

    def _verdict(self, difference: Any) -> Verdict:
        if self.memory is None:
            return Verdict("no memory attached", None, "", "this model carries no visual memory that is switched on")
        if not any(sample.sees for sample in self.samples):
            return Verdict("not enough data", None, "", "no prompt has an image, so there is nothing to remember")
        measure, enough = "of task score", ENOUGH_SCORE
        figure = difference(self._score, "other image")
        if figure is not None:
            figure = Estimate(-figure.value, -figure.high, -figure.low, figure.n)
        elif self._blind:
            measure, enough = "nats per token of text written without the memory", ENOUGH_LOGPROB
            sighted = [a - b for a, b in zip(self._content["intact"], self._content["other image"], strict=True)]
            both = [(a + b) / 2 for a, b in zip(sighted, self._blind, strict=True)]
            figure = estimate(_units(both, self._done < FEW, True))
        if figure is None or figure.n < 3:
            n = 0 if figure is None else figure.n
            return Verdict("not enough data", None, "", f"{n} units were measured; an interval needs 3 or more")
        return verdict_from(figure, measure, enough)


def verdict_from(figure: Estimate, measure: str, enough: float) -> Verdict:
    """The rule: used if the whole interval is above 0 and the value is `enough`; barely used if it is less."""
    rule = f"used: 95 % interval above 0 and at least {enough:g}; barely used: above 0 but less; else not used"
    if figure.low > 0:
        return Verdict("used" if figure.value >= enough else "barely used", figure, measure, rule)
    return Verdict("not used", figure, measure, rule)


_HALF_WAY = {
    "unchanged": "the same image all along",
    "image swapped": "the first half was written about one image; then another stands in its place",
    "image removed": "the first half was written about the image; then there is none",
    "memory swapped": "the model still sees the first image; only the memory in its cache is exchanged",
}


def _whole(sample: Sample, text: torch.Tensor) -> Case:
    return Case(sample, text, [(0, len(text))])


def _stand_ins(sample: Sample, seed: int, count: int = 4) -> list[Sample]:
    images = stand_in_images(sample.images, count, seed)
    rng = np.random.default_rng(seed)
    videos = [
        tuple(np.full_like(video, 0) + rng.integers(0, 256, (1, 1, 1, 3), dtype=np.uint8) for video in sample.videos)
        for _ in range(count)
    ]
    return [replace(sample, images=tuple(i), videos=v) for i, v in zip(images, videos, strict=True)]


def _per_answer(logp: torch.Tensor, case: Case) -> np.ndarray:
    """Log-probability per token: [answers], or [n] for a text that is scored as a whole."""
    found = logp.gather(1, case.text.to(logp.device)[:, None]).squeeze(1).cpu().numpy()
    if case.scored == [(0, len(case.text))] and case.sample.answer is None:
        return found
    return np.array([found[a:b].mean() for a, b in case.scored])


def _units(rows: Sequence[np.ndarray], few: bool, blocks: bool) -> np.ndarray:
    """Rows of values as units: one mean per row, or, of few rows, their values or blocks of their values."""
    if not few:
        return np.array([row.mean() for row in rows])
    if not blocks:
        return np.concatenate(rows)
    return np.concatenate([[part.mean() for part in np.array_split(row, max(1, len(row) // BLOCK))] for row in rows])


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of tokens that differ, 0 for equal texts."""
    return 1 - difflib.SequenceMatcher(None, a.tolist(), b.tolist(), autojunk=False).ratio()
