"""The four special tokens: in the tokenizer, in the embedding, in the head, and out of the text.

A memory in a sequence reads `<invoke> <end> <end> ... <end>`: N memory positions, which carry the end token's id and
latent vectors instead of its embedding, then the end token itself. So a sequence holds ids of the tokenizer only, and
`skip_special_tokens=True` hides a memory entirely.

The base's own embedding and head are never changed: the new rows live in a module of their own, and hooks write them
over the base's output, whether the base has spare rows at those ids or none, tied or untied.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from keepsight.errors import KeepsightError


@functools.lru_cache(maxsize=64)
def id_tensor(ids: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Token ids on a device, copied there once."""
    return torch.tensor(ids, device=device)


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

    def embed(self, ids: torch.Tensor, output: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
        """Write the rows over the base's embeddings [..., D] of `ids` [...]."""
        which = ids.unsqueeze(-1) == id_tensor(tuple(token_ids), ids.device)
        rows = self.embedding[which.to(torch.int8).argmax(-1)].to(output.dtype)
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
        missing = max(token_ids) + 1 - logits.shape[-1]
        if missing > 0:
            filler = logits.new_full((*logits.shape[:-1], missing), torch.finfo(logits.dtype).min)
            logits = torch.cat([logits, filler], -1)
        return logits.index_copy(-1, id_tensor(tuple(token_ids), logits.device), own)


class MemoryTokens:
    """Which id is which.

    Args:
        token_ids: short invoke, short end, long invoke, long end.
    """

    def __init__(self, token_ids: list[int]):
        self.ids = list(token_ids)
        self.invoke = {SHORT: token_ids[0], LONG: token_ids[2]}
        self.end = {SHORT: token_ids[1], LONG: token_ids[3]}

    def memory_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, true at all positions of memories in whole sequences: invocation, latents, end. Shape as `ids`."""
        return torch.isin(ids, id_tensor(tuple(self.ids), ids.device))

    def end_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool, true at end tokens' ids. Shape as `ids`."""
        return torch.isin(ids, id_tensor(tuple(self.end.values()), ids.device))

    def latent_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Bool [B, T], true where whole sequences [B, T] hold latents: end tokens before another end token."""
        ends = self.end_mask(ids)
        return torch.cat([ends[:, :-1] & ends[:, 1:], ends[:, -1:] & False], 1)


def add_memory_tokens(processor: Any, target: Any) -> dict[str, int]:
    """Add the four special tokens to a processor (or tokenizer), and tell the memory their ids.

    Call it before `get_peft_model`, with the config, or after it, with the model; save the processor beside the
    adapter (`processor.save_pretrained(folder)`), and `keepsight.load` finds it there. Calling it again changes
    nothing.

    Args:
        processor: the model's processor or tokenizer; changed in place.
        target: a `VisMemConfig`, or a model that carries a VisMem adapter.

    Returns:
        Token -> id.

    Raises:
        KeepsightError: if the tokens stand in the tokenizer under other ids than the memory was trained with.
    """
    from keepsight.vismem.config import VisMemConfig

    tokenizer = getattr(processor, "tokenizer", processor)
    branch, names = None, None
    if isinstance(target, VisMemConfig):
        configs = [target]
    else:
        from keepsight.vismem.tuner import VisMemBranch

        branch = VisMemBranch.of(target)
        configs = list(branch.configs.values())
    for config in configs:
        if names is not None and names != config.token_names:
            raise KeepsightError("The model's VisMem adapters name their tokens differently; load them on two models.")
        names = config.token_names
    assert names is not None
    tokenizer.add_tokens(list(names), special_tokens=True)
    ids = [int(i) for i in tokenizer.convert_tokens_to_ids(list(names))]
    delimiters = find_delimiters(tokenizer, configs[0].delimiters)
    is_new = not all(config.has_bound_tokens for config in configs)
    for config in configs:
        if config.has_bound_tokens and config.token_ids != ids:
            raise KeepsightError(
                f"The memory was made with token ids {config.token_ids}; this tokenizer gives its tokens {ids}. Use "
                "the processor that was saved with the adapter."
            )
        config.token_ids, config.delimiter_ids = ids, delimiters
    if branch is not None and is_new:
        branch.restart_rows()
    return dict(zip(names, ids, strict=True))


def find_delimiters(tokenizer: Any, delimiters: list[str]) -> list[int]:
    """Ids of the tokens that are delimiters, alone or with white space; the first is the first delimiter's own.

    Raises:
        KeepsightError: if the tokenizer has a token for none of them.
    """
    special = set(tokenizer.all_special_ids)
    found = []
    for text, index in tokenizer.get_vocab().items():
        if index in special or len(text) > 8:
            continue
        plain = tokenizer.convert_tokens_to_string([text])
        if plain.strip() in delimiters or (plain and plain in delimiters):
            found.append(int(index))
    if not found:
        raise KeepsightError(f"The tokenizer has no token for any of the delimiters {delimiters}.")
    first = tokenizer.encode(delimiters[0], add_special_tokens=False)
    return sorted(found, key=lambda index: ([index] != first[-1:], index))  # a tokenizer may have nothing for it


def decode(processor: Any, sequences: Any, target: Any, show_memory: bool = False, **kwargs: Any) -> list[str]:
    """Decode sequences to text.

    Args:
        processor: a processor or tokenizer.
        sequences: ids [B, T], or an output of `generate`.
        target: the model that carries the VisMem adapter, or its config.
        show_memory: write a memory as its invocation token, a count of latents, and its end token. By default
            memories are left out.
        kwargs: for the tokenizer's `decode`.
    """
    from keepsight.vismem.config import VisMemConfig
    from keepsight.vismem.tuner import VisMemBranch

    config = target if isinstance(target, VisMemConfig) else VisMemBranch.of(target).config
    tokens, names = MemoryTokens(config.token_ids or []), config.token_names
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = sequences if torch.is_tensor(sequences) else getattr(sequences, "sequences", sequences)
    texts = []
    for row in torch.as_tensor(ids):
        if not show_memory:
            texts.append(tokenizer.decode(row[~tokens.memory_mask(row)], **kwargs))
            continue
        latents = tokens.latent_mask(row[None])[0].tolist()
        pieces: list[str] = []
        plain: list[int] = []
        count = 0
        for index, is_latent in zip(row.tolist(), latents, strict=True):
            if is_latent:
                count += 1
            elif index in tokens.ids:
                pieces += [tokenizer.decode(plain, **kwargs)] if plain else []
                plain = []
                name = names[tokens.ids.index(index)]
                pieces.append(f"[{count} latents]{name}" if count else name)
                count = 0
            else:
                plain.append(index)
        pieces += [tokenizer.decode(plain, **kwargs)] if plain else []
        texts.append("".join(pieces))
    return texts
