"""The four special tokens: in the embedding, in the head, and in sequences of ids.

A memory in a sequence reads `<invoke> <end> <end> ... <end>`: N memory positions, which carry the end token's id and
latent vectors instead of its embedding, then the end token itself. So a sequence holds ids of the tokenizer only, and
`skip_special_tokens=True` hides a memory entirely.

The base's own embedding and head are never changed: the new rows live in a module of their own, and hooks write them
over the base's output, whether the base has spare rows at those ids or none, tied or untied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from keepsight.errors import KeepsightError

SHORT, LONG = "short", "long"
TYPES = (SHORT, LONG)


class TokenRows(nn.Module):
    """Embedding and head rows of short invoke, short end, long invoke, long end.

    Invocation and end rows are separate parameters, for separate learning rates (`parameter_groups`). With tied
    embeddings the head uses the embedding rows.

    Args:
        hidden_size: D.
        tied: the base ties head and embedding.
    """

    def __init__(self, hidden_size: int, tied: bool):
        super().__init__()
        self.invoke_embedding = nn.Parameter(torch.zeros(2, hidden_size))  # short, long
        self.end_embedding = nn.Parameter(torch.zeros(2, hidden_size))
        self.invoke_head = None if tied else nn.Parameter(torch.zeros(2, hidden_size))
        self.end_head = None if tied else nn.Parameter(torch.zeros(2, hidden_size))
        self.invoke_bias = nn.Parameter(torch.zeros(2))
        # Where the invocation rows started, to know whether they were ever trained.
        self.register_buffer("start", torch.zeros(2, hidden_size))
        self.start: torch.Tensor

    @torch.no_grad()
    def reset(self, embedding: torch.Tensor, head: torch.Tensor, perturbation: float) -> None:
        """Start all rows at one token's rows [D], with a small perturbation.

        Args:
            embedding: the delimiter's embedding.
            head: its head row.
            perturbation: length of the random part, relative to the row's own.
        """
        for parameter, row in (
            (self.invoke_embedding, embedding),
            (self.end_embedding, embedding),
            (self.invoke_head, head),
            (self.end_head, head),
        ):
            if parameter is not None:
                noise = torch.randn(parameter.shape, dtype=torch.float32) * row.float().pow(2).mean().sqrt().cpu()
                parameter.copy_(row.float().to(parameter.device) + perturbation * noise.to(parameter.device))
        self.start.copy_(self.invoke_embedding)

    @property
    def is_untrained(self) -> bool:
        """The invocation rows are still where they started."""
        moved = (self.start.to(self.invoke_embedding.dtype) != self.invoke_embedding).any()
        return not bool(moved | self.invoke_bias.any())

    @property
    def embedding(self) -> torch.Tensor:
        """[4, D]: short invoke, short end, long invoke, long end."""
        return torch.stack([self.invoke_embedding, self.end_embedding], 1).flatten(0, 1)

    @property
    def head(self) -> torch.Tensor:
        """[4, D]."""
        if self.invoke_head is None or self.end_head is None:
            return self.embedding
        return torch.stack([self.invoke_head, self.end_head], 1).flatten(0, 1)

    def embed(self, ids: torch.Tensor, output: torch.Tensor, token_ids: list[int], scale: float = 1.0) -> torch.Tensor:
        """Write the rows over the base's embeddings [..., D] of `ids` [...].

        Args:
            ids: of the embedding's call.
            output: what it returned.
            token_ids: the four ids.
            scale: what the base multiplies the rows of its own matrix by.
        """
        which = torch.stack([ids == token for token in token_ids], -1)
        rows = (self.embedding * scale)[which.to(torch.int8).argmax(-1)].to(output.dtype)
        return torch.where(which.any(-1, keepdim=True), rows, output)

    def score(self, states: torch.Tensor, logits: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
        """Write the tokens' logits over the base's [..., V], which grow where the base has no columns for them.

        Args:
            states: what the head was given [..., D].
            logits: what it returned.
            token_ids: the four ids.
        """
        bias = torch.stack([self.invoke_bias, torch.zeros_like(self.invoke_bias)], 1).flatten()
        own = (states.to(self.head.dtype) @ self.head.T + bias).to(logits.dtype)
        pieces, start = [], 0
        for column, token in sorted(enumerate(token_ids), key=lambda one: one[1]):
            pieces.append(logits[..., start:token])
            missing = token - start - pieces[-1].shape[-1]
            if missing:  # ids between the base's last column and ours: no such tokens
                pieces.append(logits.new_full((*logits.shape[:-1], missing), torch.finfo(logits.dtype).min))
            pieces.append(own[..., column : column + 1])
            start = token + 1
        return torch.cat([*pieces, logits[..., start:]], -1)


class MemoryTokens:
    """Which id is which.

    Args:
        token_ids: short invoke, short end, long invoke, long end.

    Raises:
        KeepsightError: if there are not four.
    """

    def __init__(self, token_ids: Sequence[int] | None):
        if token_ids is None or len(token_ids) != 4:
            raise KeepsightError(
                f"token_ids={token_ids}: the ids of the four special tokens are not known yet. Call "
                "add_memory_tokens(processor, config), or get_peft_model(model, config), first."
            )
        self.ids = list(token_ids)
        self.invoke = {SHORT: token_ids[0], LONG: token_ids[2]}
        self.end = {SHORT: token_ids[1], LONG: token_ids[3]}

    def invoked(self, token: int) -> str | None:
        """The type whose invocation token an id is, if it is one."""
        return next((kind for kind, own in self.invoke.items() if own == token), None)

    def memory_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, true at all positions of memories in whole sequences: invocation, latents, end. Shape as `ids`."""
        return _is_one_of(ids, self.ids)

    def latent_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool [B, T], true where whole sequences [B, T] hold latents: end tokens before another end token."""
        return latent_places(ids, self.end.values())


def latent_places(ids: torch.Tensor, ends: Iterable[int]) -> torch.Tensor:
    """Bool [..., T], true where whole sequences [..., T] hold latents: an end token's id before another's."""
    ending = _is_one_of(ids, ends)
    return torch.cat([ending[..., :-1] & ending[..., 1:], ending[..., -1:] & False], -1)


def _is_one_of(ids: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    """As `torch.isin`, without a tensor of the tokens, which would have to be copied to the device every time."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    for token in tokens:
        found = found | (ids == token)
    return found
