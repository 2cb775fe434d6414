"""Accuracy by quartile of output length, with and without the memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from keepsight.diagnose.cases import Case, Sample
from keepsight.diagnose.memories.find import memory_of
from keepsight.diagnose.memories.interface import Memory
from keepsight.diagnose.reader import Reader
from keepsight.diagnose.statistics import Estimate, estimate, strata


@dataclass(frozen=True)
class Quartile:
    """A quarter of all answers, by the length of the output before them.

    Attributes:
        shortest, longest: tokens of output.
        accuracy: method -> share of right answers. Methods: "base", "memory" (if there is one), "control" (if given).
        gain: paired difference memory minus base; None without a memory.
        relative_gain: `gain` as a share of the base's accuracy; None without a memory or if the base has 0.
    """

    shortest: int
    longest: int
    accuracy: dict[str, Estimate]
    gain: Estimate | None
    relative_gain: float | None


@dataclass(frozen=True)
class LengthResult:
    """Quartiles, and how lengths and answers were obtained ("given replies" or "written freely")."""

    how: str
    quartiles: list[Quartile]


class LengthScore:
    """Scores case by case, so that it can be stopped at any time.

    Args:
        reader: the model, with or without a memory.
        cases: cases with references whose given replies have different lengths; or
        samples: samples with references, which the model answers freely: an output is right if it contains the
            reference as whole words, and its length is that of the output without the memory.
        steps: longest free output.
        control: another model on the same base, e.g. one fine-tuned on the memory's own data.
    """

    def __init__(
        self,
        reader: Reader,
        cases: Sequence[Case] = (),
        samples: Sequence[Sample] = (),
        steps: int = 256,
        control: Reader | None = None,
    ):
        assert bool(cases) != bool(samples), "either cases with given replies or samples to answer freely"
        self.reader, self.cases, self.samples, self.steps, self.control = reader, cases, samples, steps, control
        self.memory = memory_of(reader.model)
        self._lengths: list[int] = []
        self._right: dict[str, list[bool]] = {}

    def __len__(self) -> int:
        return len(self.cases) or len(self.samples)

    def run(self) -> Iterator[int]:
        """Measure; yields the number of finished cases after each."""
        items: list[Case | Sample] = [*self.cases, *self.samples]
        for done, item in enumerate(items, 1):
            found = {}
            for name in ("base", *["memory"] * bool(self.memory), *["control"] * (self.control is not None)):
                reader = self.control if name == "control" and self.control is not None else self.reader
                off = self.memory.off() if name == "base" and self.memory is not None else nullcontext()
                memory = self.memory if name == "memory" else memory_of(reader.model) if name == "control" else None
                with off:
                    found[name] = (
                        _read(reader, memory, item)
                        if isinstance(item, Case)
                        else _answer(reader, memory, item, self.steps)
                    )
            self._lengths += found["base"][0]
            for name, (_, right) in found.items():
                self._right.setdefault(name, []).extend(right)
            yield done

    def result(self) -> LengthResult | None:
        """Quartiles of what was scored so far, fewer where answers have few lengths, since those of one length stay
        together; None for fewer than eight answers.
        """
        if len(self._lengths) < 8:
            return None
        lengths = np.array(self._lengths)
        right = {name: np.array(values, float) for name, values in self._right.items()}
        quartiles = []
        for part in strata(lengths, 4):
            gain = estimate(right["memory"][part] - right["base"][part]) if "memory" in right else None
            base = right["base"][part].mean()
            quartiles.append(
                Quartile(
                    int(lengths[part].min()),
                    int(lengths[part].max()),
                    {name: estimate(values[part]) for name, values in right.items()},
                    gain,
                    float(gain.value / base) if gain is not None and base > 0 else None,
                )
            )
        return LengthResult("given replies" if self.cases else "written freely", quartiles)


def _read(reader: Reader, memory: Memory | None, case: Case) -> tuple[list[int], list[bool]]:
    inputs = reader.inputs(case.sample)
    if memory is None:
        logp = reader.read(inputs, case.text)
    else:
        logp = memory.read(reader, inputs, case.text, memory.plan(reader, inputs, case.text, case.scored))
    right = logp.argmax(-1).cpu() == case.text
    return [a for a, _ in case.scored], [bool(right[a:b].all()) for a, b in case.scored]


def _answer(reader: Reader, memory: Memory | None, sample: Sample, steps: int) -> tuple[list[int], list[bool]]:
    how = {} if memory is None else memory.writing_options()
    text = reader.write(reader.inputs(sample), steps, exact=False, **how)
    words = reader.processor.tokenizer.decode(text.tolist(), skip_special_tokens=True)
    return [len(text)], [any(contains(words, one) for one in sample.references)]


def contains(output: str, answer: str) -> bool:
    """Whether the output has the answer in it as whole words, capitals and blanks aside."""
    plain = " ".join(output.lower().split())
    wanted = " ".join(answer.lower().split())
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", plain) is not None
