"""A request while it is served, and its answers while they are written. Plain data; the engine moves it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from keepsight.serve.errors import ApiError
from keepsight.serve.hf.grammar import Grammar
from keepsight.serve.hf.sampling import Sampling
from keepsight.serve.text import TextStream


@dataclass
class InvocationRecord:
    """One latent memory in an answer, as the client is told of it.

    Attributes:
        kind: "short" or "long": what was formed.
        invoked_as: the type that was asked for; differs under policy "reversed".
        text_offset: characters of the answer before it.
        latents: N.
        was_sampled: the model asked for it itself.
    """

    kind: str
    invoked_as: str
    text_offset: int
    latents: int
    was_sampled: bool


@dataclass
class Piece:
    """News of one answer: text, and what goes with its tokens."""

    index: int
    text: str
    logprobs: list[Any] = field(default_factory=list)


@dataclass
class Finished:
    """One answer is complete.

    Attributes:
        index: which of the request's answers.
        reason: "stop" or "length".
        tokens: positions written, memories included.
        memory_tokens: how many of them are memories.
        invocations: in order.
    """

    index: int
    reason: str
    tokens: int
    memory_tokens: int
    invocations: list[InvocationRecord]


@dataclass
class Failed:
    """The request as a whole has failed."""

    error: ApiError


Event = Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """One request, ready to be computed.

    Attributes:
        inputs: what the processor returned, one row; freed once the prompt has been read.
        prompt_tokens: length of the prompt.
        sampling: how tokens are chosen.
        choices: how many answers.
        memory: whether memories are on.
        model: which of the engine's models answers.
        grammar: what the answers are held to, at its beginning.
        source: the prompt's text and images as they came, for an engine that prepares its own inputs.
        send: takes events; called from the engine's thread, must not wait.
        when_read: called once the inputs are not needed any more; any thread, must not wait.
        is_cancelled: the engine drops it before its next step.
        error: why it failed, if it did.
    """

    inputs: dict[str, torch.Tensor]
    prompt_tokens: int
    sampling: Sampling
    choices: int
    memory: bool
    send: Callable[[Event], None]
    when_read: Callable[[], None] = lambda: None
    model: str = ""
    grammar: Grammar | None = None
    source: tuple[str, list[Any]] | None = None
    arrived: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False
    error: ApiError | None = None

    def forget(self) -> None:
        """Free the inputs."""
        self.inputs, self.source = {}, None
        self.when_read()


@dataclass(eq=False)
class Row:
    """One answer while it is written.

    Attributes:
        job: its request.
        index: which of the request's answers.
        ids: token ids of the prompt and of what has been fed of the answer.
        tokenizer: decodes its text, for this thread alone.
        do_sample: draw, or take the likeliest.
        ends: ids that end the answer.
        position: position of the newest token, [P] for P rotary dimensions, on the CPU; None if the model takes none.
        processors: transformers' logits processors for this row.
        latent: state of latent memory, if the model has one and it is on.
        written: positions after the prompt, memories included.
        memory_tokens: how many of them are memories.
        text: its text.
        generator: draws.
        grammar: what its text is held to.
    """

    job: Job
    index: int
    ids: list[int]
    tokenizer: InitVar[Any]
    do_sample: bool
    ends: frozenset[int]
    position: torch.Tensor | None = None
    processors: Any = None
    latent: Any = None
    written: int = 0
    memory_tokens: int = 0
    invocations: list[InvocationRecord] = field(default_factory=list)
    reason: str | None = None
    error: ApiError | None = None
    _seen: torch.Tensor | None = None

    def __post_init__(self, tokenizer: Any) -> None:
        sampling, grammar = self.job.sampling, self.job.grammar
        seed = secrets.randbits(63) if sampling.seed is None else (sampling.seed + self.index) % 2**63
        self.text = TextStream(tokenizer, sampling.stop)
        self.generator = torch.Generator().manual_seed(seed)
        self.grammar = None if grammar is None else grammar.copy()

    @property
    def room(self) -> int:
        """Positions that may still be written."""
        return self.job.sampling.max_tokens - self.written

    @property
    def is_over(self) -> bool:
        """Finished, failed, or nobody waits for it."""
        return self.reason is not None or self.error is not None or self.job.is_cancelled

    def seen(self, device: torch.device) -> torch.Tensor:
        """Ids [1, T] for logits processors. Kept from step to step, because making them anew takes long for a long
        prompt."""
        known = 0 if self._seen is None else self._seen.shape[1]
        added = torch.tensor([self.ids[known:]], dtype=torch.long, device=device)
        self._seen = added if self._seen is None else torch.cat([self._seen, added], 1)
        return self._seen

    def write(self, ids: list[int], memory: Collection[int], entry: Callable[[int], Any]) -> None:
        """Send the text of new positions, and find out whether the answer is over.

        Args:
            ids: of the positions.
            memory: ids that stand for memory and not for text.
            entry: log-probabilities of a token, if the request wants them.
        """
        self.written += len(ids)
        for token in ids:
            if token in memory:
                self.memory_tokens += 1
                continue
            if token in self.ends:
                self.reason = "stop"
                break
            told = entry(token) if self.job.sampling.logprobs is not None else None
            self._send(*self.text.push(token, told))
            if self.grammar is not None:
                self.grammar.write(token)
            if self.text.is_stopped or (self.grammar is not None and self.grammar.is_complete):
                self.reason = "stop"
                break
        if self.reason is None and self.room <= 0:
            self.reason = "length"
        if self.reason is not None:
            self._send(*self.text.finish())
            if self.text.is_stopped:
                self.reason = "stop"

    def _send(self, text: str, entries: list[Any]) -> None:
        if text or entries:
            self.job.send(Piece(self.index, text, entries))
