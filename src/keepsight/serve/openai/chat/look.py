"""Where the model and its memory looked for every word of an answer: the answer is written again under the meters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from pydantic import Field
from transformers import LogitsProcessor

from keepsight.diagnose.instruments.attention import AttentionMeter
from keepsight.diagnose.instruments.retrieval import RetrievalMeter
from keepsight.diagnose.reader import Reader
from keepsight.serve.errors import bad
from keepsight.serve.hf.served import Served
from keepsight.serve.openai.asked.messages import Strict
from keepsight.vismem import MemoryPolicy

LONGEST = 512  # words that one look reads; it holds up everybody else for as long


class ShownMemory(Strict):
    """A memory of the answer, as it was told with it."""

    type: str
    text_offset: int = Field(ge=0)


class Look(Strict):
    """What `/chat/look` takes beside a chat request.

    Attributes:
        request: the chat request that was answered.
        answer: what was answered.
        invocations: the memories in it.
    """

    request: dict[str, Any]
    answer: str = Field(max_length=200_000)
    invocations: list[ShownMemory] = Field(default_factory=list, max_length=64)


class _Retold(LogitsProcessor):
    """Lets only the given words be written, whatever memories stand between them."""

    def __init__(self, words: torch.Tensor, prompt: int, tokens: Any):
        self.words, self.prompt, self.tokens = words, prompt, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, V], -inf but for the next word."""
        written = input_ids[0, self.prompt :]
        count = len(written) if self.tokens is None else int((~self.tokens.memory_mask(written)).sum())
        only = torch.full_like(scores, -torch.inf)
        only[0, self.words[min(count, len(self.words) - 1)]] = 0.0
        return only


def look(served: Served, inputs: dict[str, torch.Tensor], asked: Look, memory: bool) -> dict[str, Any]:
    """Write an answer again, and note where the model and its memory looked. On the engine's thread.

    Args:
        served: the model.
        inputs: of the prompt, one row.
        asked: the answer, and its memories.
        memory: whether the memory was on.

    Returns:
        `words`: what each token adds to the text; `mass`: the image's share of attention at each, 0 to 1; `images`: the
        grid of each, (height, width); `views`: name -> for each word, per image, the grid's cells row by row, 0 to 255.
    """
    reader = Reader(served.model, served.processor)
    inputs = {name: tensor.to(served.model.device) for name, tensor in inputs.items()}
    words = reader.tokens(asked.answer)[:LONGEST]
    if not len(words):
        raise bad("answer: there is no word in it.", "answer", "invalid_value")
    latent = "vismem" in served.memories and memory
    options: dict[str, Any] = {}
    tokens = None
    if "vismem" in served.memories:
        at = {len(reader.tokens(asked.answer[: one.text_offset])): one.type for one in asked.invocations}
        options["memory"] = MemoryPolicy("forced", at=at if latent else {})
        tokens = reader.latent_tokens
    retrieval = RetrievalMeter(served.model) if "pvm" in served.memories and memory else None
    retold = _Retold(words, inputs["input_ids"].shape[1], tokens)
    with AttentionMeter(served.model, "auto", where=True) as meter, retrieval or nullcontext():
        output = reader.output(inputs, len(words), logits_processor=[retold], **options)
    trace = meter.trace
    extra = np.zeros(len(words), np.int64)  # positions of memories before each word
    for (place, _), one in zip(output.plan, output.invocations, strict=False):
        extra[place:] += len(one.latents) + 2
    slots = np.arange(len(words)) + extra
    steps = np.clip(np.searchsorted(trace.steps, slots, "right") - 1, 0, len(trace.steps) - 1)
    found: dict[str, Any] = {
        "words": reader.words(words),
        "mass": [round(float(m), 4) for m in np.nan_to_num(trace.mass[:, :, 0].mean((1, 2)))[steps]],
        "images": [],
        "views": {},
    }
    layout = trace.layouts[0] if trace.layouts else None
    if layout is None or not len(layout.slots):
        return found
    found["images"] = [(item.height, item.width) for item in layout.items]
    if trace.where is not None:
        found["views"]["the model's own attention"] = _cells(layout, trace.where[steps])
    if retrieval is not None:
        weights = retrieval.trace.weights.mean(1)
        found["views"]["the memory"] = _cells(layout, weights[np.clip(slots, 0, len(weights) - 1)])
    return found


def _cells(layout: Any, weights: np.ndarray) -> list[list[list[int]]]:
    """Weights [n, M] as cells 0 to 255: for each word, one list per image; of several frames their sum."""
    maps = [grid.sum(1).reshape(len(weights), -1) for grid in layout.maps(weights)]
    peak = np.maximum(np.concatenate(maps, 1).max(1, keepdims=True), 1e-30)
    scaled = [(grid / peak * 255).round().astype(int) for grid in maps]
    return [[grid[n].tolist() for grid in scaled] for n in range(len(weights))]
