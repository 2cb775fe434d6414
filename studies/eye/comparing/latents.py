"""Is a VisMem's latent memory read? The test's questions with none, with each type, and with another image's latents.

The memory stands before the first word of the answer. The prompt is read once for all of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from keepsight.diagnose.battery.lengths import contains
from keepsight.vismem import MemoryPolicy, RolloutOptions, VisMemBranch
from keepsight.vismem.scope import replace_latents
from keepsight.vismem.tokens import TYPES
from studies.eye import lengths
from studies.eye.lengths import Shown
from studies.eye.publishing.data import conversation
from studies.eye.questions import named

NEVER, FREE = "never", "free"
_WORDS = 8
"""Longest answer, in tokens."""

Latents = dict[str, torch.Tensor]
"""By type of memory, `[1, N, D]`."""


@torch.no_grad()
def measure(
    model: Any,
    processor: Any,
    these: list[Shown],
    narrations: list[list[int]],
    asked_at: list[int],
    free: bool = False,
    on_progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Greedy answers behind narrations, under every memory.

    Another image is the last one before that lacks what is asked for and shows something that the own one does not;
    where there is none, as of the first image, nothing is asked with its latents.

    Args:
        model, processor: an exported eye with a VisMem on it (`keepsight.load`).
        these: images and questions (`lengths.shown`).
        narrations: tokens of each; image number n stands before narration n modulo their number.
        asked_at: lengths of narration.
        free: also let the model decide itself, which reads every prompt once more.
        on_progress: called with what is measured, how much of it is done and of how much.

    Returns:
        Rows of `memory`, `length`; `right`, `named` and `follows`, a "1" or "0" for each image, "-" where nothing was
        asked: the answer is right to the letter, names the thing in whatever words, or names one that the other image
        alone shows; and `said`, the answers.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {
        (memory, length): {"right": "", "named": "", "follows": "", "said": []}
        for length in asked_at
        for memory in (NEVER, *TYPES, *(f"{kind}, other" for kind in TYPES), *([FREE] if free else []))
    }
    made: dict[tuple[int, int], Latents] = {}
    for number, one in enumerate(these):
        on_progress("the latents", number, len(these))
        other = _other(these, number)
        asked = [name for name in one.names if named(name) == one.question.answer]
        alone = [] if other is None else [name for name in these[other].names if name not in one.names]
        for length in asked_at:
            inputs = _inputs(processor, one, narrations[number % len(narrations)][:length])
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            given = made[other, length] if other is not None else None
            said, made[number, length] = _answers(model, processor, inputs, given)
            if free:
                written = model.generate(**inputs, memory=FREE, max_new_tokens=_room(model), do_sample=False)
                said[FREE] = _texts(processor, inputs, written)[0]
            for memory in (memory for memory, at in rows if at == length):
                row, text = rows[memory, length], said.get(memory)
                row["right"] += "-" if text is None else str(int(text == one.question.answer))
                row["named"] += "-" if text is None else str(int(_names(text, asked)))
                row["follows"] += "-" if text is None or other is None else str(int(_names(text, alone)))
                row["said"].append(text)
    return [{"memory": memory, "length": length, **row} for (memory, length), row in rows.items()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: shares that are right, by memory and length, of the images that were asked about; and where it is
    another one, the share that names the thing in whatever words.
    """
    asked_at = list(dict.fromkeys(row["length"] for row in rows))
    told = ["| memory | " + " | ".join(map(str, asked_at)) + " |", "|---|" + "---|" * len(asked_at)]
    for memory in dict.fromkeys(row["memory"] for row in rows):
        cells = [_cell(row) for row in rows if row["memory"] == memory]
        told.append(f"| {memory} | " + " | ".join(cells) + " |")
    return told


def _cell(row: dict[str, Any]) -> str:
    right, anyhow = (row[of].replace("-", "") for of in ("right", "named"))
    if not right:
        return "-"
    loosely = "" if anyhow == right else f" (named: {100 * anyhow.count('1') / len(right):.0f} %)"
    return f"{100 * right.count('1') / len(right):.0f} % of {len(right)}{loosely}"


def _names(text: str, things: list[str]) -> bool:
    return any(contains(text, thing) for thing in things)


def _inputs(processor: Any, one: Shown, told: list[int]) -> dict[str, torch.Tensor]:
    """The question as `keepsight eval` asks it."""
    from PIL import Image

    pixels = (255 * one.image[0]).round().byte().permute(1, 2, 0).numpy()
    messages = conversation(one, told, "", processor.tokenizer)["messages"][:-1]
    parts = [
        {
            "role": message["role"],
            "content": [
                *([{"type": "image"}] if number == 0 else []),
                *([{"type": "text", "text": text}] if (text := message["content"].removeprefix("<image>")) else []),
            ],
        }
        for number, message in enumerate(messages)
    ]
    text = processor.apply_chat_template(parts, add_generation_prompt=True)
    return dict(processor(text=[text], images=[Image.fromarray(pixels)], add_special_tokens=False, return_tensors="pt"))


def _answers(
    model: Any, processor: Any, inputs: dict[str, torch.Tensor], given: Latents | None
) -> tuple[dict[str, str], Latents]:
    """What is written under each memory, and the image's own latents."""
    at: dict[str, dict[int, str]] = {NEVER: {}, **{kind: {0: kind} for kind in TYPES}}
    if given is not None:
        at |= {f"{kind}, other": {0: kind} for kind in TYPES}
    own: Latents = {}

    def change(kind: str, latents: torch.Tensor) -> torch.Tensor:
        own[kind] = latents[:1].clone()
        return latents if given is None else torch.cat([latents[:1], given[kind].to(latents)])

    with replace_latents(change):
        written = model.generate(
            **inputs,
            memory=MemoryPolicy("forced", at=list(at.values())),
            rollout=RolloutOptions(copies=len(at)),
            max_new_tokens=_room(model),
            do_sample=False,
        )
    return dict(zip(at, _texts(processor, inputs, written), strict=True)), own


def _room(model: Any) -> int:
    config = VisMemBranch.of(model).config
    return _WORDS + 2 + max(config.num_short, config.num_long)


def _texts(processor: Any, inputs: dict[str, torch.Tensor], written: torch.Tensor) -> list[str]:
    texts: list[str] = processor.tokenizer.batch_decode(
        written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in texts]


def _other(these: list[Shown], number: int) -> int | None:
    one = these[number]
    for before in reversed(range(number)):
        names = these[before].names
        if all(named(name) != one.question.answer for name in names) and not set(names) <= set(one.names):
            return before
    return None


def tested(pictures: Any, size: Any, side: int, images: int) -> list[Shown]:
    """The images of the test that an eye exported with `side` takes."""
    return next(found for found in lengths.shown(pictures, size, images).values() if found[0].side == side)
