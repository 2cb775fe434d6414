"""What the tests of serving share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from families import FIRST_WORD, LAST_WORD, VOCAB, Row, TinyFamily, make_inputs

from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.rows import Failed, Finished, Job, Piece
from keepsight.serve.hf.sampling import Sampling

#: Random models write words only, never placeholder or end tokens.
WORDS_ONLY = {i: -1e4 for i in range(VOCAB) if not FIRST_WORD <= i < LAST_WORD}


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(f"{i} " for i in ids)


class Answers:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.text: dict[int, str] = {}
        self.done: dict[int, Finished] = {}
        self.logprobs: dict[int, list[Any]] = {}
        self.failed: Failed | None = None

    def __call__(self, event: Any) -> None:
        if isinstance(event, Piece):
            self.text[event.index] = self.text.get(event.index, "") + event.text
            self.logprobs.setdefault(event.index, []).extend(event.logprobs)
        elif isinstance(event, Finished):
            self.done[event.index] = event
        else:
            self.failed = event

    def ids(self, index: int = 0) -> list[int]:
        return [int(word) for word in self.text.get(index, "").split()]


def make_job(
    family: TinyFamily, model: Any, row: Row, memory: bool = True, choices: int = 1, inputs: Any = None, **sampling: Any
) -> Job:
    options = {"max_tokens": 12, "temperature": 0.0, "logit_bias": WORDS_ONLY, "logprobs": 0} | sampling
    inputs = make_inputs(family, model, [row]) if inputs is None else inputs
    return Job(
        inputs=inputs,
        prompt_tokens=inputs["input_ids"].shape[1],
        sampling=Sampling(**options),
        choices=choices,
        memory=memory,
        send=Answers(),
    )


def finish(batch: Batch) -> None:
    """Step until every row has left."""
    while batch.rows:
        report(batch.step())


def report(rows: list[Any]) -> None:
    """What the engine does with rows that are over, without its thread."""
    for row in rows:
        if row.error is not None:
            row.job.send(Failed(row.error))
        elif row.reason is not None:
            row.job.send(Finished(row.index, row.reason, row.written, row.memory_tokens, row.invocations))


def alone(model: Any, job: Job, tokenizer: Any = None) -> Answers:
    """The answer to a request that has the model to itself."""
    batch = Batch(model, tokenizer or Numbers(), job.memory).read(job)
    finish(batch)
    return job.send  # type: ignore[return-value]


def values(answers: Answers, index: int = 0) -> torch.Tensor:
    """Log-probabilities of the chosen tokens."""
    return torch.tensor([entry[1] for entry in answers.logprobs[index]])
