"""Prompts of reinforcement learning: samples as model inputs, in an order that any process can work out by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from keepsight.data.collate import require_chat_template
from keepsight.train.vismem.rollout import Prompt


class Samples(Protocol):
    """A list of samples, or something like it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Question:
    """One sample, ready to be answered.

    Attributes:
        inputs: what the processor makes of it, one row.
        messages: the conversation up to the answer, as rewards get it.
        columns: the sample's other columns, such as `answer`.
    """

    inputs: Prompt
    messages: list[dict[str, Any]]
    columns: dict[str, Any]


class Questions:
    """Samples as questions, read when they are asked for.

    Args:
        samples: a sequence of {"messages": the turns before the answer, "images": PIL images, and other columns}.
        processor: the model's processor, with a chat template.
        dtype: of pixels.
    """

    def __init__(self, samples: Samples, processor: Any, dtype: torch.dtype = torch.float32):
        require_chat_template(processor)
        self.samples, self.processor, self.dtype = samples, processor, dtype

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Question:
        sample = self.samples[index]
        messages, images = sample["messages"], list(sample.get("images") or ())
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        encoded = self.processor(
            text=[text],
            images=[images] if images else None,
            add_special_tokens=False,  # the chat template has written them
            return_tensors="pt",
        )
        inputs = {name: torch.as_tensor(value) for name, value in encoded.items()}
        inputs = {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in inputs.items()}
        columns = {name: value for name, value in sample.items() if name not in ("messages", "images")}
        return Question(inputs, messages, columns)


@dataclass(frozen=True)
class Order:
    """Which samples are in which step: a pure function of the step, so that nothing needs to be saved to resume.

    Attributes:
        samples: how many there are.
        batch_size: prompts per step; the last step of an epoch takes what is left.
        seed: of the shuffle, which is another one in every epoch.
    """

    samples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the samples."""
        return math.ceil(self.samples / self.batch_size)

    def batch(self, step: int) -> list[int]:
        """Indices of the samples of one step (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        return order[place * self.batch_size : (place + 1) * self.batch_size]
