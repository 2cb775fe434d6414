"""VisMem on the lab's further tasks: training a memory on some of them, reading with one before the questions.

As in `studies.vismem.training`, but narrations are of `studies.tasks.tasks`, and the memory is always formed just
before the first scored fact (the paper's curriculum from full stops to any position is left out).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from studies.tasks.tasks import TaskBatch, facts_for_length, make_batch
from studies.vismem.reading import Reading
from studies.vismem.training import Progress, Prompt, TrainingPlan, stage_one, warm_start

WARM_LENGTHS = (8, 40)
"""Generated tokens in the texts of the warm start."""


def question_column(batch: TaskBatch) -> int:
    """The column of the first token of the first fact that asks for something."""
    return max(begin for begin in batch.begins if begin < int(batch.answers[0]))


def train_memory(
    model: Any,
    processor: Any,
    plan: TrainingPlan,
    tasks: Sequence[str],
    seed: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the memory that `model` carries on some tasks: warm start, then stage I. Returns facts for a record."""
    facts: dict[str, Any] = {}
    if plan.warm_steps:
        texts = _texts(processor, plan, tasks, np.random.default_rng([seed, 6000]))
        facts |= warm_start(model, processor, plan, seed, progress, texts)
    if plan.steps:
        facts |= stage_one(model, processor, plan, seed, progress, lambda rng: _prompt(processor, plan, tasks, rng))
    return facts


def _texts(
    processor: Any, plan: TrainingPlan, tasks: Sequence[str], rng: np.random.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        facts = facts_for_length(str(rng.choice(list(tasks))), int(rng.integers(*WARM_LENGTHS)), scored=2)
        batch = make_batch(processor, facts, plan.warm_batch, "train", rng)
        whole, end = batch.input_ids.shape, int(batch.answers[-1]) + 2
        yield {k: v[:, :end] if v.shape == whole else v for k, v in batch.model_inputs().items()}


def _prompt(processor: Any, plan: TrainingPlan, tasks: Sequence[str], rng: np.random.Generator) -> Prompt:
    length = int(rng.integers(plan.shortest, plan.longest + 1))
    batch = make_batch(processor, facts_for_length(str(rng.choice(list(tasks))), length), plan.batch, "train", rng)
    return Prompt(batch, question_column(batch), len(batch.answers))


@torch.no_grad()
def answers_with_memory(model: Any, batch: TaskBatch, kinds: Sequence[str] = ("long",), content: str = "own") -> Any:
    """The most probable tokens [B, A] at all answers, with memories before the first question.

    Args:
        model: carries VisMem.
        batch: narrations that end in questions.
        kinds: types of the memories, in order.
        content: "own": as formed. "none": no memory. "embeddings": the images' visual embeddings again. "part": only N
            of them, evenly spread, as many as a memory has latents; what a store that cannot compress can hold.
            "pooled": N averages of neighbours, which is what the warm start aims at. "notes": the words of the notes
            again.
    """
    reading = Reading(model, batch, question_column(batch))
    for kind in kinds if content != "none" else ():
        reading.invoke(kind)
        reading.splice(kind, _latents(reading, batch, kind, content))
    return reading.predict(batch.answers).argmax(-1)


def _latents(reading: Reading, batch: TaskBatch, kind: str, content: str) -> torch.Tensor:
    seen, count = reading.embeddings, reading.branch.formers().length(kind)
    if content == "own":
        return reading.form(kind)
    if content == "embeddings":
        return seen
    if content == "part":
        return seen[:, torch.linspace(0, seen.shape[1] - 1, count).round().long()]
    if content == "pooled":
        return F.adaptive_avg_pool1d(seen.transpose(1, 2), count).transpose(1, 2)
    assert content == "notes", content
    told = [begin for begin in batch.begins if begin < int(batch.answers[0])]
    words = batch.input_ids[:, batch.start : told[-2] + 4] if len(told) > 1 else batch.input_ids[:, :0]
    return reading.backbone.model.get_input_embeddings()(words)
