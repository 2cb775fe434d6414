"""Text beside the questions: behind an image, the model with the method on is to expect what it expects with it off.

The questions' loss is on answers alone, so nothing tells a branch to be still in a text; stage (c) of the eye's making
asks the same of its LoRA (studies/eye/making/recall.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from studies.eye import sequences
from studies.eye.making import recall
from studies.eye.making.align import answers
from studies.eye.making.stages import generator
from studies.eye.sizes import Size


class Texts:
    """Pieces of text, and how far a method moves what is expected of them.

    Args:
        tokenizer: of the model.
        size: of the eye.
        narrations: tokens of each, for training.
        seed: of what is drawn.
    """

    def __init__(self, tokenizer: Any, size: Size, narrations: list[list[int]], seed: int):
        self.tokenizer, self.size, self.seed = tokenizer, size, seed
        self.texts = recall.texts(narrations, 0, tokenizer)
        self.turn = tokenizer(sequences.ASKED)["input_ids"]

    def piece(self, step: int) -> list[int]:
        """What is read beside the questions of a step; nothing in every second one."""
        draws = generator(self.seed, 10, step)
        text = self.texts[int(torch.randint(len(self.texts), (1,), generator=draws))]
        begin = int(torch.randint(max(1, len(text) - recall.TOKENS), (1,), generator=draws))
        return text[begin : begin + recall.TOKENS] if step % recall.EVERY else []

    def apart(self, trained: Any, image: torch.Tensor, side: int, piece: list[int]) -> torch.Tensor:
        """KL divergence a token between what is expected of a piece behind an image with the method off and with it on.

        Args:
            trained: PEFT's model around the method.
            image: `[1, 3, S, S]` in [0, 1].
            side: pictures along its side.
            piece: at least two tokens.
        """
        part = sequences.Part(self.turn + piece, len(self.turn) + 1)

        def expected() -> torch.Tensor:
            model = trained.base_model.model
            return answers(model, self.tokenizer, image, [[part]], side, self.size)[1].log_softmax(-1)

        with torch.no_grad(), trained.disable_adapter():
            before = expected()
        return F.kl_div(expected(), before, reduction="batchmean", log_target=True)
