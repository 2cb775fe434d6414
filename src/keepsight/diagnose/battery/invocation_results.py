"""Results of counting invocations: each memory, what followed it, and both over the outputs of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field

from keepsight.diagnose.statistics import Estimate
from keepsight.words import counted

AFTER = 16  # text tokens whose log-probability is compared
SOON = 2  # another memory after at most so many text tokens: a loop
GRAM, WINDOW = 4, 32  # repetition: share of 4-grams in the next 32 tokens that stand in the 64 before


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
