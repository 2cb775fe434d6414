"""The special tokens in a processor: added to its tokenizer, and left out of (or shown in) decoded text."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.vismem.branch import VisMemBranch
from keepsight.vismem.config import VisMemConfig
from keepsight.vismem.tokens import MemoryTokens


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
    tokenizer = getattr(processor, "tokenizer", processor)
    branch, names = None, None
    if isinstance(target, VisMemConfig):
        configs = [target]
    else:
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
    first = tokenizer.encode(delimiters[0], add_special_tokens=False)[-1:]
    found.sort(key=lambda index: ([index] != first, index))
    if found[:1] != first and delimiters != VisMemConfig().delimiters:  # of those that nobody chose, any will do
        warnings.warn(
            f"The tokenizer has no token for the delimiter {delimiters[0]!r}, so invocation tokens start as "
            f"{tokenizer.decode([found[0]])!r}. Name first what is to be chosen, of those that are one token.",
            KeepsightWarning,
            stacklevel=2,
        )
    return found


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
    config = target if isinstance(target, VisMemConfig) else VisMemBranch.of(target).config
    tokens, names = MemoryTokens(config.token_ids), config.token_names
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
