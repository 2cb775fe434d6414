"""One image and several questions in one sequence, none of which sees another; distance is a matter of positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from studies.eye.questions import Question

ASKED = "<|im_end|>\n<|im_start|>assistant\n"
"""Between what was said before and a turn of the assistant's, in the language model's chat format."""


@dataclass(frozen=True)
class Part:
    """A piece of text after the image that sees the image and itself.

    Args:
        ids: its tokens; image tokens among them are the sequence's image again.
        answer: where in `ids` the answer begins; `len(ids)` where there is none.
        gap: positions between the image's end and its first token. A text of `gap` tokens that is hidden from
            attention leaves exactly this.
        hears: how many tokens of the sequence's first part it sees as well.
    """

    ids: list[int]
    answer: int
    gap: int = 0
    hears: int = 0


@dataclass
class Batch:
    """Sequences of images and parts.

    Args:
        ids: `[B, T]`; where `image` holds, the image's tokens in their order, as often as they stand there.
        image: `[B, T]` bool.
        positions: `[3, B, T]`.
        mask: `[B, 1, T, T]` bool, true where the column is seen.
        labels: `[B, T]`: the next token where it belongs to an answer, else -100.
        parts: `[B, T]`: number of the part that a token belongs to, from 1; 0 before, -1 for padding.
    """

    ids: torch.Tensor
    image: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    parts: torch.Tensor

    def to(self, device: Any) -> Batch:
        """On another device."""
        return Batch(**{key: value.to(device) for key, value in vars(self).items()})


def part(question: Question, tokenizer: Any, gap: int = 0) -> Part:
    """A question in a turn of its own, in the language model's chat format, with its answer."""
    asked = f"<|im_end|>\n<|im_start|>user\n{question.text}{ASKED}"
    before, after = tokenizer(asked)["input_ids"], tokenizer(f"{question.answer}<|im_end|>")["input_ids"]
    return Part(before + after, len(before), gap)


def narration(text: str, tokenizer: Any) -> Part:
    """A turn of the assistant's between image and question, that questions of the same sequence do not see."""
    ids = tokenizer(f"{ASKED}{text}")["input_ids"]
    return Part(ids, len(ids))


def lay_out(parts: list[list[Part]], side: int, model: Any, tokenizer: Any) -> Batch:
    """Sequences: a user's turn with an image of `side * side` tokens, then parts; each sees the image and itself.

    A part may hold the image again: `framed`, or as bare tokens, which stand one behind another.
    """
    config = model.config
    begin = tokenizer("<|im_start|>user\n")["input_ids"]
    head = [*begin, *framed(side, config)]
    start = _positions(head, side, config)
    after = int(start.max())
    length = len(head) + max(sum(len(one.ids) for one in row) for row in parts)
    count = len(parts)
    ids = torch.full((count, length), tokenizer.pad_token_id)
    owner = torch.full((count, length), -1)
    labels = torch.full((count, length), -100)
    positions = torch.zeros(3, count, length, dtype=torch.long)
    heard = torch.zeros(count, length, dtype=torch.long)
    for row, these in enumerate(parts):
        ids[row, : len(head)] = torch.tensor(head)
        owner[row, : len(head)] = 0
        positions[:, row, : len(head)] = start
        at = len(head)
        for number, one in enumerate(these, 1):
            end = at + len(one.ids)
            ids[row, at:end] = torch.tensor(one.ids)
            owner[row, at:end] = number
            positions[:, row, at:end] = _positions(one.ids, side, config) + after + 1 + one.gap
            heard[row, at:end] = one.hears
            answer = torch.tensor(one.ids[one.answer :], dtype=torch.long)
            labels[row, at + one.answer - 1 : end - 1] = answer
            at = end
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    seen |= (owner[:, None, :] == 1) & (torch.arange(length) < len(head) + heard[:, :, None])
    mask = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    return Batch(ids, ids == config.image_token_id, positions, mask, labels, owner)


def framed(side: int, config: Any) -> list[int]:
    """An image of `side * side` tokens between the tokens that frame it."""
    return [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]


def _positions(ids: list[int], side: int, config: Any) -> torch.Tensor:
    """`[3, T]`: of time, height and width, as Qwen2.5-VL counts them; a framed image lies in a square."""
    offset = torch.arange(side)
    square = torch.stack([torch.zeros(side**2, dtype=torch.long), offset.repeat_interleave(side), offset.repeat(side)])
    found, at, number = [torch.zeros(3, 0, dtype=torch.long)], 0, 0  # a narration may be of no tokens at all
    while number < len(ids):
        found.append(torch.full((3, 1), at))
        at, number = at + 1, number + 1
        if ids[number - 1] == config.vision_start_token_id:
            found.append(square + at)
            at, number = at + side, number + side**2
    return torch.cat(found, 1)


def answers(model: Any, batch: Batch, pixels: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where answers are, and the tokens that should stand there.

    Args:
        model: a Qwen2.5-VL.
        batch: sequences, one image each.
        pixels, grids: the images' patches, as its tower takes them.

    Returns:
        `[N, vocabulary]` float32 and `[N]`, N tokens of answers in the order of `batch.labels`.
    """
    times = (batch.image.sum(1) // (grids[0].prod() // model.config.vision_config.spatial_merge_size**2)).tolist()
    each = pixels.view(len(grids), -1, pixels.shape[-1])
    often = [number for number, count in enumerate(times) for _ in range(count)]
    hidden = model.model(
        input_ids=batch.ids,
        pixel_values=each[often].flatten(0, 1),
        image_grid_thw=grids[often],
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    asked = batch.labels >= 0
    return model.lm_head(hidden[asked]).float(), batch.labels[asked]


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the tokens of answers."""
    return F.cross_entropy(logits, targets)


def exact(batch: Batch, logits: torch.Tensor) -> list[list[bool]]:
    """For each sequence and part with an answer: would greedy decoding write exactly this answer?

    It would if and only if every token of it is the likeliest after those before it.
    """
    right = torch.ones_like(batch.labels, dtype=torch.bool)
    asked = batch.labels >= 0
    right[asked] = logits.argmax(-1) == batch.labels[asked]
    return [
        [
            bool(right[row][batch.parts[row] == number].all())
            for number in range(1, int(batch.parts[row].max()) + 1)
            if bool(asked[row][batch.parts[row] == number].any())
        ]
        for row in range(len(batch.ids))
    ]
