"""Causal interventions on a memory: switch it off, spoil it, exchange it, and measure what changes.

The verdict rests on one contrast: the memory of the *right* image against that of *another* image, everything else
equal. Switching a memory off shows that it does something; only the contrast shows that what it remembers matters. A
random, untrained block changes outputs too, but it helps no more with the right image than with a wrong one.

What is compared: the task score where there are references. Where there are none, the log-probability of text that was
written *without* the memory. Text written with it would favour it unfairly: a text is by construction likely under the
very contents that it was written with, also where these are noise. That text is read twice, while the decoder itself
sees the right image and while it sees the other one, and the two contrasts are averaged: in short outputs a decoder
that sees the right image needs no memory, and a memory that could tell it everything would seem useless.

A memory that comes at some places only (VisMem) is formed at the same places of the same text in all readings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from keepsight.diagnose.battery.halfway import difference, half_way
from keepsight.diagnose.battery.tally import CONDITIONS, Tally
from keepsight.diagnose.battery.verdict import CausalResult
from keepsight.diagnose.cases import Case, Sample, stand_in_images
from keepsight.diagnose.memories.find import memory_of
from keepsight.diagnose.memories.interface import Inputs, Memory, Plan
from keepsight.diagnose.memories.tampering import Contents, matched_noise, mixed_from, scaled, taken_from, zeroed
from keepsight.diagnose.reader import Reader

DONORS = 3
MOST_OTHERS = 8  # other images that a mixture draws from


@dataclass(frozen=True)
class _Text:
    """A text with the places of its memories, what they hold, and what they would hold for other images."""

    case: Case
    plan: Plan
    contents: Contents
    others: list[Contents]


class Battery:
    """Measures case by case, so that it can be stopped at any time; `result()` says what is known so far.

    Args:
        reader: the model, with or without a memory.
        cases: with references (`Reader.case`, or a task's own), all of them or none.
        samples: without references; give either these or `cases`.
        steps: tokens that the model writes per sample where there are no references.
        seed: of noise and choices.
        memory: which memory to tamper with; default: the one the model carries.
        only: of `CONDITIONS`, these, and nothing half-way; "other image" is needed for a verdict.
    """

    def __init__(
        self,
        reader: Reader,
        cases: Sequence[Case] = (),
        samples: Sequence[Sample] = (),
        steps: int = 128,
        seed: int = 0,
        memory: Memory | None = None,
        only: Sequence[str] | None = None,
    ):
        assert bool(cases) != bool(samples), "either cases with references or samples without"
        self.reader, self.cases, self.steps, self.seed = reader, list(cases), steps, seed
        self.samples = [case.sample for case in cases] or list(samples)
        self.memory: Memory | None = memory or memory_of(reader.model)
        self.conditions = tuple(CONDITIONS) if only is None else tuple(only)
        self.with_half_way = only is None
        self._tally = Tally()
        self._kept: dict[int, Contents] = {}  # by image, of memories that depend on nothing else

    def __len__(self) -> int:
        return len(self.samples)

    def run(self) -> Iterator[int]:
        """Measure; yields the number of finished samples after each."""
        for index in range(len(self.samples)):
            self._measure(index)
            yield self._tally.done

    # -- one sample -----------------------------------------------------------------------------------------------
    def _measure(self, index: int) -> None:
        sample, memory = self.samples[index], self.memory
        inputs = self.reader.inputs(sample)
        own, plan, free = self._texts(index, inputs)
        rows: dict[str, dict[str, Any]] = {}
        blind: np.ndarray | None = None
        if memory is not None and sample.sees:
            others = self._others(index)
            texts = [self._with_contents(own, plan, inputs, others)]
            if free is not own:
                free_plan = memory.plan(self.reader, inputs, free.text, free.scored)
                texts.append(self._with_contents(free, free_plan, inputs, others))
            for name in ("intact", *self.conditions):
                row = self._row(name, inputs, texts, self.seed * 1000 + index)
                if row is not None:
                    rows[name] = row
            if not self.cases:
                blind = self._read_blind(texts[-1], others[:DONORS])
        half: dict[str, dict[str, Any]] = {}
        if sample.sees and self.with_half_way:
            other, images = self._other_case(index)
            half = half_way(self.reader, memory, own, plan, inputs, other, images)
        # Only now, when the sample is complete, it counts: an interrupted one leaves no unpaired figures.
        self._tally.add(rows, blind, half, plan)

    def _texts(self, index: int, inputs: Inputs) -> tuple[Case, Plan, Case]:
        """The text that is scored or that the model wrote, where its memories stand, and text written without them."""
        if self.cases:
            case = self.cases[index]
            plan = self.memory.plan(self.reader, inputs, case.text, case.scored) if self.memory is not None else ()
            return case, plan, case
        sample = self.samples[index]
        if self.memory is None:
            own = _whole(sample, self.reader.write(inputs, self.steps))
            return own, (), own
        text, plan = self.memory.write(self.reader, inputs, self.steps)
        with self.memory.off():
            free = _whole(sample, self.reader.write(inputs, self.steps))
        if not plan:  # it came nowhere by itself: have it come where it would be put into a text that is only read
            plan = self.memory.plan(self.reader, inputs, free.text, free.scored)
            if plan:
                text, plan = self.memory.write(self.reader, inputs, self.steps, plan)
        return _whole(sample, text), plan, free

    def _with_contents(self, case: Case, plan: Plan, inputs: Inputs, others: list[Sample]) -> _Text:
        return _Text(
            case,
            plan,
            self._contents(case, plan, case.sample, inputs),
            [self._contents(case, plan, other) for other in others],
        )

    def _contents(self, case: Case, plan: Plan, image: Sample, inputs: Inputs | None = None) -> Contents:
        """What is remembered of another image (or the sample's own) while the text of `case` is read."""
        assert self.memory is not None
        key = id(image)
        if not self.memory.depends_on_text and key in self._kept:
            return self._kept[key]
        if inputs is None:
            sample = replace(case.sample, images=image.images, videos=image.videos)
            inputs = self.reader.inputs(sample if self.memory.depends_on_text else image)
        found = self.memory.contents(self.reader, inputs, case.text, plan)
        if not self.memory.depends_on_text and any(image is sample for sample in self.samples):
            self._kept[key] = found
        return found

    def _row(self, name: str, inputs: Inputs, texts: list[_Text], seed: int) -> dict[str, Any] | None:
        """What one change does to the texts; None if it cannot be made."""
        memory, reader = self.memory, self.reader
        assert memory is not None
        if name == "off":
            with memory.off():
                return self._figures(texts, lambda text: reader.read(inputs, text.case.text), self._again(inputs))
        if name == "other type":
            plans = [plan for text in texts if (plan := memory.other_type(text.plan)) is not None]
            if not texts[0].plan or len(plans) < len(texts):
                return None
            exchanged = dict(zip(map(id, texts), plans, strict=True))
            return self._figures(
                texts,
                lambda text: memory.read(reader, inputs, text.case.text, exchanged[id(text)]),
                self._again(inputs, plans[0]),
            )
        versions = [self._versions(name, text, seed) for text in texts]
        found = []
        for which in range(len(versions[0])):
            contents = {id(text): version[which] for text, version in zip(texts, versions, strict=True)}
            # writing again is the slow part, and one of several other images is enough for it
            again = self._again(inputs, texts[0].plan, versions[0][which]) if name != "intact" and not which else None
            found.append(
                self._figures(
                    texts,
                    lambda text, contents=contents: memory.read(
                        reader, inputs, text.case.text, text.plan, contents[id(text)]
                    ),
                    again,
                )
            )
        return {key: np.mean([row[key] for row in found if key in row], 0) for key in found[0]}

    def _versions(self, name: str, text: _Text, seed: int) -> list[Contents]:
        """The contents under one change; several for several other images."""
        depends = self.memory is not None and self.memory.depends_on_text
        changes = {
            "intact": [lambda contents: contents],
            "zeroed": [zeroed],
            "matched noise": [matched_noise(seed, text.others if depends else ())],
            "shuffled across samples": [mixed_from(text.others, seed)],
            "other image": [taken_from(other) for other in text.others[:DONORS]],
            "scaled x0.5": [scaled(0.5)],
            "scaled x2": [scaled(2.0)],
        }[name]
        return [change(text.contents) if text.contents else [] for change in changes]

    def _again(self, inputs: Inputs, plan: Plan | None = None, contents: Contents | None = None) -> Any:
        """Writes the answer again: (tokens) -> text [n]. The memory is off if no plan is given."""
        assert self.memory is not None
        memory = self.memory
        if plan is None:
            return lambda steps: self.reader.write(inputs, steps)
        return lambda steps: memory.write(self.reader, inputs, steps, plan, contents)[0]

    def _figures(self, texts: list[_Text], read: Any, again: Any) -> dict[str, Any]:
        """Score, log-probability, content and change of one reading."""
        own, free = texts[0].case, texts[-1].case
        logp = read(texts[0])
        found: dict[str, Any] = {"logprob": _per_answer(logp, own)}
        if self.cases:
            right = logp.argmax(-1).cpu() == own.text
            found["score"] = np.array([bool(right[a:b].all()) for a, b in own.scored], float)
        else:
            found["content"] = _per_answer(read(texts[-1]), free)
            if again is not None:
                found["changed"] = difference(own.text, again(len(own.text)))
        return found

    def _read_blind(self, free: _Text, others: list[Sample]) -> np.ndarray:
        """Right image minus other image in the memory [n], while the decoder sees the other image."""
        memory, case = self.memory, free.case
        assert memory is not None
        differences = []
        for other, theirs in zip(others, free.others, strict=False):
            inputs = self.reader.inputs(replace(case.sample, images=other.images, videos=other.videos))
            read = [
                _per_answer(memory.read(self.reader, inputs, case.text, free.plan, contents), case)
                for contents in (taken_from(free.contents)(theirs), theirs)
            ]
            differences.append(read[0] - read[1])
        return np.mean(differences, 0)

    def _others(self, index: int) -> list[Sample]:
        """Other samples, or stand-ins where there are none. Contents that depend on the text are dear: few of them."""
        assert self.memory is not None
        most = DONORS if self.memory.depends_on_text else MOST_OTHERS
        found = [
            self.samples[other]
            for step in range(1, len(self.samples))
            if self.samples[other := (index + step) % len(self.samples)].sees
        ]
        return found[:most] or _stand_ins(self.samples[index], self.seed)

    def _other_case(self, index: int) -> tuple[Case | None, Sample]:
        for step in range(1, len(self.samples)):
            other = (index + step) % len(self.samples)
            if self.samples[other].sees:
                return (self.cases[other] if self.cases else None), self.samples[other]
        return None, _stand_ins(self.samples[index], self.seed)[0]

    def result(self) -> CausalResult:
        """What was found in the samples that are finished."""
        sees = any(sample.sees for sample in self.samples)
        return self._tally.result(None if self.memory is None else self.memory.method, bool(self.cases), sees)


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
    if case.whole:
        return found
    return np.array([found[a:b].mean() for a, b in case.scored])
