"""Long texts that stand between image and question: written by the language model itself, once, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from keepsight.errors import KeepsightError
from studies.eye.sequences import ASKED

LONGEST = 2048
"""Tokens of a narration."""
FILE = "narrations.json"

_KINDS = ("Tell me a long story about {}.", "Explain {} to me in detail.", "Write a long dialogue about {}.")
_ABOUT = (
    "justice",
    "mathematics",
    "the tides",
    "the roads of Rome",
    "friendship",
    "inflation",
    "sleep",
    "glaciers",
    "chess",
    "democracy",
    "photosynthesis",
    "earthquakes",
    "forgetting",
    "harmony in music",
    "trade by sea",
    "the weather in spring",
)
"""None of what the eye learns to name."""
_TURNS = 8
_SHORTEST, _LONGEST = 256, 320
"""New tokens of a turn."""


@torch.no_grad()
def write(language: Any, tokenizer: Any, file: Path, seed: int = 0) -> None:
    """Let the language model answer a prompt of every kind about every thing, and write the answers into `file`.

    Sampled at temperature 0.8 from the likeliest 95 %, with a repetition penalty of 1.1, in bfloat16. The file is what
    later runs read, since sampling is not the same on every machine.

    Args:
        language, tokenizer: the language model; it is put into bfloat16.
        file: JSON.
        seed: of the sampling and of the order.
    """
    torch.manual_seed(seed)
    prompts = [kind.format(about) for about in _ABOUT for kind in _KINDS]
    order = torch.randperm(len(prompts)).tolist()
    prompts = [prompts[number] for number in order]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    language = language.to(torch.bfloat16)
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    # on the left: the template's own call leaves padding_side unheard, and answers behind padding are no English
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    made = language.generate(
        **given,
        do_sample=True,
        temperature=0.8,
        repetition_penalty=1.1,
        top_p=0.95,
        min_new_tokens=_SHORTEST,
        max_new_tokens=_LONGEST,
        pad_token_id=tokenizer.eos_token_id,
    )
    answers = tokenizer.batch_decode(made[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    turns = [[prompt, answer.strip()] for prompt, answer in zip(prompts, answers, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"seed": seed, "turns": turns}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def check_lengths(longest: int, shortest: int = 0) -> None:
    """Raises KeepsightError: no narration is so long, or none is as long and as short as that."""
    if longest > LONGEST:
        raise KeepsightError(f"--longest {longest}: a narration has {LONGEST} tokens. Give that or less.")
    if shortest > longest:
        raise KeepsightError(f"--shortest {shortest}: expected at most --longest, which is {longest}.")


def read(file: Path, tokenizer: Any) -> list[list[int]]:
    """Narrations of exactly `LONGEST` tokens each: eight turns of a conversation, cut; the first turn answers nothing.

    Raises:
        KeepsightError: there are none yet, or they are too short.
    """
    if not file.is_file():
        raise KeepsightError(f"{file} is not there. Let it be written: python -m studies eye narrate")
    turns = json.loads(file.read_text(encoding="utf-8"))["turns"]
    found: list[list[int]] = []
    for begin in range(0, len(turns) - _TURNS + 1, _TURNS):
        text = ""
        for prompt, answer in turns[begin : begin + _TURNS]:
            asked = f"<|im_end|>\n<|im_start|>user\n{prompt}" if text else ""
            text += f"{asked}{ASKED}{answer}"
        ids = tokenizer(text)["input_ids"]
        if len(ids) < LONGEST:
            raise KeepsightError(f"{file}: narration {len(found)} has {len(ids)} tokens; expected {LONGEST} or more.")
        found.append(ids[:LONGEST])
    return found
