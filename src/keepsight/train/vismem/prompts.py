"""Questions as model inputs, in an order that is a function of the step; batches with left padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from keepsight.data.check import CheckedData, read_sample
from keepsight.data.collate import require_chat_template
from keepsight.vismem.sequences import pad_left

#: Model inputs of one conversation: `input_ids` [1, T] and what belongs to it.
Prompt = Mapping[str, torch.Tensor]


class Samples(Protocol):
    """A list of samples, or something like it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class CheckedSamples:
    """Checked data as the trainer reads them."""

    def __init__(self, data: CheckedData):
        self.data = data

    def __len__(self) -> int:
        return self.data.rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return read_sample(self.data.dataset[index], self.data.source)


@dataclass(frozen=True)
class ReadySample:
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

    def __getitem__(self, index: int) -> ReadySample:
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
        return ReadySample(inputs, messages, columns)


@dataclass(frozen=True)
class QuestionOrder:
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


def stack_prompts(prompts: Sequence[Prompt], pad: int) -> dict[str, torch.Tensor]:
    """Prompts of one row each as one batch, padded on the left.

    Args:
        prompts: model inputs with one row each; some may have no image.
        pad: id of the padding token.
    """
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    names = dict.fromkeys(name for prompt in prompts for name in prompt)
    batch = {}
    for name in names:
        values = [prompt[name] for prompt in prompts if name in prompt]
        if is_tokenwise(name, prompts):
            values = [prompt.get(name, torch.zeros_like(prompt["input_ids"])) for prompt in prompts]
            values = [pad_left(v, longest, 1, pad if name == "input_ids" else 0) for v in values]
        batch[name] = torch.cat(_of_one_size(values))
    return batch


def _of_one_size(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs of several prompts that differ in more than their first dimension, filled up behind as processors do.

    LLaVA's images have as many tiles as the largest has, Idefics' prompts as many images as the longest has, and
    Pixtral's pictures the size of the largest; what is a picture and what is not stands in another input.
    """
    shape = [max(sizes) for sizes in zip(*(v.shape[1:] for v in values), strict=True)]

    def lacking(value: torch.Tensor) -> list[int]:
        pairs = zip(reversed(value.shape[1:]), reversed(shape), strict=True)
        return [side for has, wanted in pairs for side in (0, wanted - has)]

    return [F.pad(value, lacking(value)) for value in values]


def is_tokenwise(name: str, prompts: Sequence[Prompt]) -> bool:
    """Whether an input has one value per token."""
    prompt = next(p for p in prompts if name in p)
    return prompt[name].shape == prompt["input_ids"].shape


def padding_id(model: Any) -> int:
    """The id that fills up batches."""
    for config in (model.generation_config, model.config.get_text_config(), model.config):
        value = getattr(config, "pad_token_id", None)
        if value is not None:
            return int(value)
    return 0
