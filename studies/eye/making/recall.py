"""Stage (c): the language that stage (b) cost is brought back, while the questions go on.

Answers of three words are all that a LoRA has seen till then, and it forgets how to write anything else. What the
language model itself, with the LoRA off, expects of plain text is what it is to expect with it on: alone, and behind
an image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from studies.eye import sequences
from studies.eye.making.align import Alignment, answers
from studies.eye.making.stages import generator

TOKENS = 128
"""Of text in a step that has some."""
EVERY = 2
"""Steps from one with text to the next: text doubles what a step costs."""
_LANGUAGE = 1.0
"""Weight of what is expected of the text, besides the questions."""
_BOLD = 0.8
"""Share of restyled images: the tower no longer learns, and what it makes of hands it knows is surer than of others."""

Batch = tuple[tuple[torch.Tensor, list[list[sequences.Part]], int], list[int], bool]


def texts(narrations: list[list[int]], held_out: int, tokenizer: Any) -> list[list[int]]:
    """Tokens of what is read: narrations that no test and no validation uses, and Python's own description of itself.

    The latter is English that every Python brings; versions differ a little.
    """
    from pydoc_data.topics import topics

    kept = narrations[: len(narrations) - held_out]
    told = tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    return [*kept, *[told] * max(1, len(kept))]


class Recall:
    """Text beside the questions of stage (b).

    Args:
        alignment: of stage (b), with a LoRA.
        texts: tokens of each; every second step takes a piece of one.
    """

    def __init__(self, alignment: Alignment, texts: list[list[int]]):
        self.alignment, self.texts = alignment, texts

    def batch(self, step: int) -> Batch:
        """What stage (b) would ask next, a piece of text or none, and whether it is read behind the first image."""
        size = self.alignment.size
        draws = generator(size.seed, 8, step)

        def whole(below: int) -> int:
            return int(torch.randint(below, (1,), generator=draws))

        asked = self.alignment.batch(size.align_steps + step, _BOLD)
        if step % EVERY:
            return asked, [], False
        text = self.texts[whole(len(self.texts))]
        begin = whole(max(1, len(text) - TOKENS))
        return asked, text[begin : begin + TOKENS], bool(whole(2))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Of the questions, and how far what is expected of the text is from what it was (KL divergence a token)."""
        asked, text, behind = batch
        of = self.alignment
        if not text:
            return of.loss(asked)
        ids = torch.tensor([text], device=of.model.device)
        dtype = of.size.computing(of.model.device.type)
        with torch.autocast(of.model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad(), of.wrapped.disable_adapter():
                expected = of.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            if behind:
                images, _, side = asked
                part = sequences.Part(text, 1)
                logits = answers(of.model, of.tokenizer, images[:1], [[part]], side, of.size)[1]
            else:
                logits = of.model(input_ids=ids).logits[0, :-1].float()
        apart = F.kl_div(logits.log_softmax(-1), expected, reduction="batchmean", log_target=True)
        return of.loss(asked) + _LANGUAGE * apart
