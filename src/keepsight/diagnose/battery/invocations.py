"""Count invocations of a latent memory along outputs, and what follows each of them (VisMem).

The paper shows the ratio of short and long invocations by relative position, per data set (2511.11007, figure 5). Here
an output's ratio in a tenth of its length is 1 if at least one memory of the type was formed in it, else 0; reported is
the mean over outputs with its bootstrap interval.

What a memory does is read off its own output: the log-probability of the next tokens with it, minus that with it taken
out and all others left as they are. The text was written with it and therefore favours it (see `causal.py`), so the
figure is an upper bound of its use, and a value near 0 says that it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from keepsight.diagnose.battery.invocation_results import (
    AFTER,
    GRAM,
    SOON,
    WINDOW,
    DatasetInvocations,
    Effect,
    Followed,
    Formed,
    InvocationResult,
)
from keepsight.diagnose.cases import Sample
from keepsight.diagnose.memories.vismem import VisMemHandle
from keepsight.diagnose.reader import Output, Reader
from keepsight.diagnose.statistics import Estimate, estimate

TENTHS = 10
SHOWN = 24  # memories that are listed one by one


class InvocationCount:
    """Writes an output per sample and counts; sample by sample, so that it can be stopped at any time.

    Args:
        reader: the model.
        memory: its latent memory.
        samples: what to write about.
        steps: at most so many text tokens per output.
        temperature: of the outputs.
        exact: hold the end token back, so that all outputs have `steps` tokens.
    """

    def __init__(
        self,
        reader: Reader,
        memory: VisMemHandle,
        samples: Sequence[Sample],
        steps: int,
        temperature: float = 0.0,
        exact: bool = False,
    ):
        self.reader, self.memory, self.samples = reader, memory, list(samples)
        self.steps, self.temperature, self.exact = steps, temperature, exact
        self._outputs: list[tuple[str, Output, list[Formed]]] = []
        self._followed: list[Followed] = []
        self._elsewhere: list[float] = []

    def __len__(self) -> int:
        return len(self.samples)

    def run(self) -> Iterator[int]:
        """Measure; yields the number of finished samples after each."""
        for index, sample in enumerate(self.samples):
            inputs = self.reader.inputs(sample)
            output = self.reader.output(
                inputs,
                self.steps,
                exact=self.exact,
                temperature=self.temperature,
                memory=self.memory.policy,
                seed=self.memory.seed + index,
            )
            formed = formed_in(self.memory, output)
            followed = self._follow(sample, index, inputs, output, formed)
            self._elsewhere += self._repetition_elsewhere(output, index)
            self._followed += followed
            self._outputs.append((sample.dataset or "samples", output, formed))
            yield index + 1

    def _follow(
        self, sample: Sample, index: int, inputs: dict[str, torch.Tensor], output: Output, formed: list[Formed]
    ) -> list[Followed]:
        text, plan = output.text, output.plan
        latents = [invocation.latents[None] for invocation in output.invocations]
        target = text[:, None]

        def logp(kept: list[int]) -> torch.Tensor:
            found = self.memory.read(
                self.reader, inputs, text, tuple(plan[i] for i in kept), [latents[i] for i in kept]
            )
            return found.cpu().gather(1, target)[:, 0]

        everything = list(range(len(plan)))
        intact = logp(everything) if plan else None
        found = []
        for which, memory in enumerate(formed):
            after = slice(memory.place, memory.place + AFTER)
            change = None
            if intact is not None and memory.place < len(text):
                without = logp([i for i in everything if i != which])
                change = float((intact - without)[after].mean())
            found.append(
                Followed(
                    sample.dataset or "samples",
                    index,
                    memory,
                    len(text),
                    "".join(self.reader.words(text[memory.place : memory.place + 12])) if len(text) else "",
                    formed[which + 1].place - memory.place if which + 1 < len(formed) else None,
                    change,
                    repetition(text.tolist(), memory.place),
                )
            )
        return found

    @staticmethod
    def _repetition_elsewhere(output: Output, seed: int) -> list[float]:
        """Repetition after four random places that have no memory near them."""
        rng = np.random.default_rng(seed)
        taken = [place for place, _ in output.plan]
        free = [i for i in range(1, len(output.text)) if all(abs(i - place) > WINDOW for place in taken)]
        chosen: list[int] = rng.choice(free, min(4, len(free)), replace=False).tolist() if free else []
        values = [repetition(output.text.tolist(), place) for place in chosen]
        return [value for value in values if value is not None]

    def result(self) -> InvocationResult:
        """What was found in the outputs that are finished."""
        result = InvocationResult(self.memory.policy.name, self.memory.policy.model_decides)
        for name in dict.fromkeys(name for name, _, _ in self._outputs):
            outputs = [(len(output.text), formed) for dataset, output, formed in self._outputs if dataset == name]
            result.datasets[name] = _count(outputs)
        for kind in ("short", "long"):
            mine = [f for f in self._followed if f.memory.kind == kind]
            if mine:
                result.effects[kind] = _effect(mine)
        if self._elsewhere:
            result.repeats_elsewhere = estimate(np.array(self._elsewhere))
        limit = self.memory.config.max_invocations
        if self._outputs:
            result.full = float(np.mean([len(formed) >= limit for _, _, formed in self._outputs]))
        result.followed = self._followed[:SHOWN]
        return result


def formed_in(memory: VisMemHandle, output: Output) -> list[Formed]:
    """The memories of an output."""
    found, extra = [], 0
    for which, (place, kind) in enumerate(output.plan):
        chosen = output.invocations[which].was_sampled if which < len(output.invocations) else False
        found.append(Formed(place, kind, place + extra, memory.sizes[kind], chosen))
        extra += memory.sizes[kind] + 2
    return found


def repetition(text: Sequence[int], place: int) -> float | None:
    """Share of 4-grams in the `WINDOW` tokens from `place` on that stand already in the 64 tokens before it."""
    before, after = text[max(0, place - 2 * WINDOW) : place], text[place : place + WINDOW]
    grams = [tuple(after[i : i + GRAM]) for i in range(len(after) - GRAM + 1)]
    if not grams:
        return None
    known = {tuple(before[i : i + GRAM]) for i in range(len(before) - GRAM + 1)}
    return float(np.mean([gram in known for gram in grams]))


def tenth(place: int, length: int) -> int:
    """Which tenth of an output a place lies in."""
    return min(TENTHS * place // max(length, 1), TENTHS - 1)


def _count(outputs: list[tuple[int, list[Formed]]]) -> DatasetInvocations:
    ratio: dict[str, list[Estimate]] = {}
    any_: dict[str, Estimate] = {}
    count: dict[str, Estimate] = {}
    for kind in ("short", "long"):
        hits = np.zeros((len(outputs), TENTHS))
        for row, (length, formed) in enumerate(outputs):
            for memory in formed:
                if memory.kind == kind:
                    hits[row, tenth(memory.place, length)] += 1
        ratio[kind] = [estimate(column) for column in (hits > 0).T]
        any_[kind] = estimate(np.any(hits, axis=1))
        count[kind] = estimate(hits.sum(1))
    return DatasetInvocations(len(outputs), float(np.mean([length for length, _ in outputs])), ratio, any_, count)


def _effect(followed: list[Followed]) -> Effect:
    until = [f.until for f in followed if f.until is not None]
    logprob = np.array([f.logprob for f in followed if f.logprob is not None])
    repeats = np.array([f.repeats for f in followed if f.repeats is not None])
    return Effect(
        len(followed),
        float(np.median(until)) if until else None,
        estimate(logprob) if len(logprob) else None,
        estimate(repeats) if len(repeats) else None,
        float(np.mean([f.until is not None and f.until <= SOON for f in followed])),
    )
