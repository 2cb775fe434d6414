"""Ask a model many questions in batches, with its memory as it is, off, or invoked by a policy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.data.collate import may_refuse, require_chat_template
from keepsight.diagnose.reader import no_sampling
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.peft_method import MemoryBranch, memory_off
from keepsight.vismem import MemoryPolicy, VisMemBranch
from keepsight.vismem.sequences import WordLimit

#: What `memory` may be: on and off for both methods; the rest are a VisMem's policies.
SETTINGS = ("on", "off", "free", "only_short", "only_long", "random", "reversed")


@dataclass(frozen=True)
class Question:
    """One conversation that ends with the user's turn.

    Attributes:
        messages: as chat templates take them, images and videos as parts without content.
        images: PIL images, in the order of their parts.
        videos: videos, each uint8 [F, H, W, 3], likewise.
    """

    messages: list[dict[str, Any]]
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: without special tokens and memories.
        tokens: written, memories not counted.
        prompt_tokens: read, visual ones included.
        invocations: a VisMem's memories: (type, text tokens written before it).
    """

    text: str
    tokens: int
    prompt_tokens: int
    invocations: tuple[tuple[str, int], ...] = ()


class Answerer:
    """Answers questions. Rows of a batch are as each would be alone, up to rounding.

    Args:
        model: a supported VLM, with or without adapters.
        processor: its processor.
        memory: one of `SETTINGS`.

    Raises:
        KeepsightError: for a setting that this model's memory does not know.
    """

    def __init__(self, model: Any, processor: Any, memory: str = "on"):
        require_chat_template(processor)
        self.model, self.processor, self.memory = model, processor, memory
        self.branch = VisMemBranch.find(model)
        has_memory = any(isinstance(module, MemoryBranch) for module in model.modules())
        if memory not in SETTINGS:
            raise KeepsightError(f"memory={memory!r}: expected one of {', '.join(SETTINGS)}.")
        if memory not in ("on", "off") and self.branch is None:
            raise KeepsightError(f"memory={memory!r} is a policy of a VisMem, and this model carries none.")
        if memory == "off" and not has_memory:
            raise KeepsightError("memory='off': this model carries no memory, so there is nothing to switch off.")

    @torch.no_grad()
    def answers(self, questions: Sequence[Question], max_new_tokens: int, **options: Any) -> list[Answer]:
        """One answer per question, in one batch.

        Args:
            questions: the batch.
            max_new_tokens: at most so many per answer; a VisMem's memories come on top.
            options: further arguments of `generate`; without any, decoding is greedy.
        """
        inputs = self._inputs(questions)
        given: dict[str, Any] = {"do_sample": False} | options
        if not given["do_sample"]:
            given = no_sampling(self.model) | given
        scope: AbstractContextManager[None] = nullcontext()
        words = max_new_tokens
        if self.memory == "off":
            scope = memory_off(self.model)
        elif self.branch is not None:
            config = self.branch.config
            policy = MemoryPolicy.of(None if self.memory == "on" else self.memory, config)
            max_new_tokens += config.most_positions
            limit = WordLimit(self.branch.tokens, inputs["input_ids"].shape[1], words)
            given |= {"memory": policy, "return_dict_in_generate": True, "stopping_criteria": [limit]}
        backbone = Backbone.of(self.model)
        given["suppress_tokens"] = [*(given.get("suppress_tokens") or ()), *backbone.visual_token_ids()]
        with scope, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "An invocation loop was cut", KeepsightWarning)
            out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **given)
        return self._read(out, inputs, words)

    def _inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        texts = [
            self.processor.apply_chat_template(q.messages, tokenize=False, add_generation_prompt=True)
            for q in questions
        ]
        given: dict[str, Any] = {"text": texts, "add_special_tokens": False, "return_tensors": "pt", "padding": True}
        if any(q.images for q in questions):
            given["images"] = [list(q.images) for q in questions]
        if any(q.videos for q in questions):
            given |= {"videos": [list(q.videos) for q in questions], "do_sample_frames": False}
        with may_refuse(self.processor, "these questions"):
            inputs = self.processor(**given, padding_side="left")
        return dict(inputs.to(self.model.device))

    def _read(self, out: Any, inputs: Mapping[str, torch.Tensor], limit: int) -> list[Answer]:
        prompt = inputs["input_ids"].shape[1]
        read = inputs["attention_mask"].sum(1).tolist()
        sequences = getattr(out, "sequences", out)
        memories = getattr(out, "invocations", None)
        tokens = None if memories is None or self.branch is None else self.branch.tokens
        ends = _ends(self.model, self.processor)
        found = []
        for row, ids in enumerate(sequences[:, prompt:].cpu()):
            word = torch.ones_like(ids, dtype=torch.bool) if tokens is None else ~tokens.memory_mask(ids)
            places = () if memories is None else memories[row]
            formed = tuple((one.kind, int(word[: one.position - prompt].sum())) for one in places)
            written = ids[word][:limit]
            stop = next((i for i, token in enumerate(written.tolist()) if token in ends), len(written))
            text = self.processor.tokenizer.decode(written[:stop], skip_special_tokens=True)
            found.append(Answer(text.strip(), stop, read[row], formed))
        return found


def _ends(model: Any, processor: Any) -> set[int]:
    """The tokens that end an answer."""
    named = getattr(Backbone.of(model).model.generation_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return {i for i in (*ids, processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id) if i is not None}
