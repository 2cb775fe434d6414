"""The next tokens of all rows: one look at the logits for all that take the likeliest, one draw each for the others.

A row draws from its own generator once per token that it writes, and never while a memory goes in: how many steps that
takes depends on the company, and the same seed must give the same answer in any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from keepsight.serve.errors import explain
from keepsight.serve.hf.rows import Row
from keepsight.serve.hf.sampling import NO_TOKEN, draw, likeliest

if TYPE_CHECKING:
    from keepsight.serve.hf.latent import LatentMemories


def next_tokens(rows: list[Row], logits: torch.Tensor, latent: LatentMemories | None) -> list[int]:
    """A token id for every row; 0 where nothing is chosen: a memory goes in, or the row failed and has its error.

    Args:
        rows: B rows.
        logits: [B, V], left as they are.
        latent: the rows' latent memories, which forbid some tokens.
    """
    scores = logits if latent is None else latent.constrained(rows, logits)
    tokens = [0] * len(rows)
    best: dict[int, torch.Tensor] = {}  # row -> its scores [1, V], where the likeliest token is taken
    for i, row in enumerate(rows):
        if latent is not None and row.latent.queue:
            continue
        try:
            own = scores[i : i + 1]
            if row.grammar is not None:
                own = row.grammar.constrained(own, () if latent is None else latent.tokens.ids)
            if row.processors:
                seen = row.seen(scores.device)
                own = row.processors(seen if latent is None else latent.seen(row, seen), own.clone())
            if row.do_sample:
                tokens[i] = draw(own, row.generator)
            else:
                best[i] = own
        except Exception as error:
            row.error = explain(error)
    if best:
        for i, token in zip(best, likeliest(torch.cat(list(best.values()))), strict=True):
            if token is None:
                rows[i].error = explain(FloatingPointError(NO_TOKEN))
            else:
                tokens[i] = token
    return tokens
