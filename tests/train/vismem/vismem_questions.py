"""What the tests of VisMem's stages share: questions about digits, quick settings, and a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_training import draw_digit, write_rows

from keepsight.train.vismem.train import (
    FormationSettings,
    InvocationSettings,
)

WEIGHTS = "adapter_model.safetensors"
SIZES: dict[str, Any] = {
    "num_queries": 2,
    "num_short": 2,
    "num_long": 3,
    "query_width": 16,
    "query_heads": 2,
    "short_rank": 2,
    "long_rank": 2,
}
QUICK: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 2,
    "group_size": 3,
    "lr": 3e-3,
    "max_new_tokens": 6,
    "max_invocations": 2,
    "save_steps": 2,
}
OFTEN: dict[str, Any] = {"delimiter_probability": 1.0, "anywhere_probability": 0.3}


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Share of the words that are digits: something that even an untrained model does now and then."""
    return [sum(word.isdigit() for word in text.split()) / max(1, len(text.split())) for text in completions]


def formation(**changes: Any) -> FormationSettings:
    return FormationSettings(**(QUICK | OFTEN | {"device": "cpu"} | changes))


def invocation(**changes: Any) -> InvocationSettings:
    return InvocationSettings(**(QUICK | {"device": "cpu", "start_bias": 3.0} | changes))


def make_questions(folder: Path, count: int = 7, without: int = 1) -> Path:
    """Questions about digits; the last ones have no image."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        draw_digit(index).save(folder / f"{index}.png")
        image = {} if index >= count - without else {"image": f"{index}.png"}
        rows.append({"prompt": "describe", "answer": str(index), "subject": f"digit {index}", **image})
    return write_rows(folder / "questions.jsonl", rows)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(a: Path, b: Path) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
