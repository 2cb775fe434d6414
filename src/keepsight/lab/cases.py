"""The lab's digit grids as a task of the diagnosis: images whose facts are known, for the models made here."""

from __future__ import annotations

from typing import Any

import numpy as np

from keepsight.diagnose.cases import Case, Sample
from keepsight.diagnose.task import KnownImages
from keepsight.lab.evaluation import SCORED
from keepsight.lab.narration import DESCRIBE, DIGITS, TOKEN, gaps_for_length, make_narrations

GAP = 8  # filler words before a memory that is probed


class DigitGrids:
    """See `keepsight.diagnose.task.KnownTask`.

    Args:
        processor: the reference VLM's.
    """

    prompt = DESCRIBE
    temperature = 1.0  # at 0 the reference VLM repeats itself
    exact = True
    lengths: tuple[int, ...] = (32, 128, 512, 1024, 2048)
    about = "Images and references are the lab's: digit grids with unseen handwriting"

    def __init__(self, processor: Any):
        self.processor = processor

    @classmethod
    def of(cls, processor: Any) -> DigitGrids | None:
        """The task, if this is the processor of the reference VLM or of a base made by `keepsight lab pretrain`."""
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            return None
        vocabulary = tokenizer.get_vocab()
        further = vocabulary.keys() - TOKEN.keys()  # VisMem's four tokens, in an adapter's processor
        known = TOKEN.items() <= vocabulary.items() and further <= tokenizer.get_added_vocab().keys()
        return cls(processor) if known else None

    def causal_length(self, method: str | None) -> int:
        """PVM far beyond where the base fails; VisMem, which is trained at shorter texts, nearer."""
        return 1024 if method == "VisMem" else 4096

    def cases(self, count: int, length: int, seed: int = 0) -> list[Case]:
        """Narrations about unseen test glyphs, each with six answers near `length` generated tokens."""
        batch = make_narrations(
            self.processor, gaps_for_length(length), count, "test", np.random.default_rng([seed, length])
        )
        cases = []
        for row in range(count):
            text = batch.input_ids[row, batch.start : -1]
            places = [int(a) - batch.start for a in batch.answers[-SCORED:]]
            sample = Sample(DESCRIBE, (batch.images[row],), dataset="digits")
            facts, asked = batch.digits[row] + TOKEN[DIGITS[0]], batch.cells[row, -SCORED:]
            cases.append(Case(sample, text, [(p, p + 1) for p in places], facts, asked))
        return cases

    def images(self, rows: int, test: bool, seed: list[int]) -> KnownImages:
        """Grids with the digit of each cell, and `GAP` words of a narration."""
        rng = np.random.default_rng(seed)
        batch = make_narrations(self.processor, [GAP], rows, "test" if test else "train", rng)
        inputs = batch.model_inputs()
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name] = inputs[name][:, : batch.start]
        return KnownImages(inputs, batch.input_ids[:, batch.start : batch.start + GAP], batch.digits.numpy())

    def questions(self, facts: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Which digit stands in each cell; in which row and column one stands, where that is but one."""
        asked = [("digit of each cell", facts)]
        grid = facts.reshape(-1, 4, 4)
        for name, axis in (("row of a digit", 2), ("column of a digit", 1)):
            there = np.stack([(grid == digit).any(axis) for digit in range(10)], 1)  # [n, 10, 4]
            asked.append((name, np.where(there.sum(-1) == 1, there.argmax(-1), -1)))
        return asked
