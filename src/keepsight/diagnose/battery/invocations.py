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
from dataclasses import dataclass, field

import numpy as np
import torch

from keepsight.diagnose.cases import Sample
from keepsight.diagnose.memories.vismem import VisMemHandle
from keepsight.diagnose.reader import Output, Reader
from keepsight.diagnose.statistics import Estimate, estimate
from keepsight.words import counted

TENTHS = 10
AFTER = 16  # text tokens whose log-probability is compared
SOON = 2  # another memory after at most so many text tokens: a loop
GRAM, WINDOW = 4, 32  # repetition: share of 4-grams in the next 32 tokens that stand in the 64 before
SHOWN = 24  # memories that are listed one by one


@dataclass(frozen=True)
class Formed:
    """One memory in an output.

    Attributes:
        place: text tokens before it.
        kind: "short" or "long".
        slot: positions after the prompt before it, those of earlier memories included.
        latents: N, its vectors.
        chosen: the model invoked it; otherwise a policy did.
    """

    place: int
    kind: str
    slot: int
    latents: int
    chosen: bool


@dataclass(frozen=True)
class Followed:
    """One memory and what followed it.

    Attributes:
        dataset, output: which output it stands in.
        memory: the memory.
        length: text tokens of that output.
        words: the next text tokens, as text.
        until: text tokens until the next memory, or None if it was the last.
        logprob: mean change in log-probability of the next `AFTER` tokens of its own output that it makes; None at the
            end of an output.
        repeats: share of 4-grams in the next `WINDOW` tokens that stand already in the text shortly before it; None
            for fewer than 4 tokens.
    """

    dataset: str
    output: int
    memory: Formed
    length: int
    words: str
    until: int | None
    logprob: float | None
    repeats: float | None


@dataclass(frozen=True)
class DatasetInvocations:
    """Invocations in the outputs of one data set.

    Attributes:
        outputs: how many outputs.
        length: mean number of text tokens.
        ratio: type -> 10 estimates: share of outputs with a memory of that type in each tenth of their length.
        any: type -> share of outputs with at least one memory of that type.
        count: type -> memories per output.
    """

    outputs: int
    length: float
    ratio: dict[str, list[Estimate]]
    any: dict[str, Estimate]
    count: dict[str, Estimate]


@dataclass(frozen=True)
class Effect:
    """What memories of one type did, over all outputs.

    Attributes:
        memories: how many.
        until: median number of text tokens to the next memory; None if none was followed by another.
        logprob: change in log-probability per token of the next tokens.
        repeats: repetition after it (see `Followed`).
        loops: share followed by another memory within `SOON` text tokens.
    """

    memories: int
    until: float | None
    logprob: Estimate | None
    repeats: Estimate | None
    loops: float


@dataclass
class InvocationResult:
    """All about invocations.

    Attributes:
        policy: by which memories were invoked.
        chosen: the model chose; otherwise the places say nothing about it.
        datasets: name -> what was counted there.
        effects: type -> what followed.
        repeats_elsewhere: repetition after places without a memory, for comparison.
        full: share of outputs that used up the maximum number of invocations.
        followed: up to 24 memories one by one.
    """

    policy: str
    chosen: bool
    datasets: dict[str, DatasetInvocations] = field(default_factory=dict)
    effects: dict[str, Effect] = field(default_factory=dict)
    repeats_elsewhere: Estimate | None = None
    full: float = 0.0
    followed: list[Followed] = field(default_factory=list)

    @property
    def sentence(self) -> str:
        """The findings in one line."""
        outputs = sum(d.outputs for d in self.datasets.values())
        memories = sum(e.memories for e in self.effects.values())
        if not memories:
            return f"No memory was invoked in {counted(outputs, 'output')} (policy {self.policy!r})."
        kinds = ", ".join(f"{effect.memories} {kind}" for kind, effect in self.effects.items())
        who = "the model chose the places" if self.chosen else "the policy chose the places, not the model"
        formed, there = counted(memories, "memory", "memories"), counted(outputs, "output")
        return f"{formed} ({kinds}) in {there}; policy {self.policy!r}: {who}."


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
