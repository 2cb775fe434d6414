"""Memories that were written before, given back to the whole sequences that they stand in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.vismem import scope
from keepsight.vismem.branch import VisMemBranch
from keepsight.vismem.memory import Invocation
from keepsight.vismem.writing.output import VisMemOutput

#: Per row, the memories of whole sequences, in order.
Invocations = Sequence[Sequence[Invocation]]


def invocations_of(given: Any) -> Invocations:
    """Per row its memories, of a whole output or as they are.

    Raises:
        KeepsightError: if they are neither.
    """
    rows: Any = given.invocations if isinstance(given, VisMemOutput) else given
    lists = isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in rows)
    if not lists or not all(isinstance(one, Invocation) for row in rows for one in row):
        raise KeepsightError(
            f"invocations: found {_kind(rows)}; expected is, for each row, the list of its memories: out.invocations "
            "of the output that the sequences come from (generate(..., return_dict_in_generate=True))."
        )
    return rows


def _kind(value: Any) -> str:
    inside = next(iter(value), None) if isinstance(value, (list, tuple)) else None
    return type(value).__name__ + (f" of {type(inside).__name__}" if inside is not None else "")


def splice(
    model: Any, sequences: torch.Tensor, invocations: Invocations | VisMemOutput | torch.Tensor
) -> AbstractContextManager[Any]:
    """Give whole sequences their memories: for one uncached forward, as in training.

    Example:
        >>> with splice(model, out.sequences, out.invocations):
        ...     logits = model(input_ids=out.sequences, attention_mask=mask, **pixels).logits

    Args:
        model: a model that carries VisMem.
        sequences: ids [B, T], as `generate` returned them.
        invocations: the output's, or the output; or latents [n, D] in their order, for memories formed anew with
            gradients.
    """
    branch = VisMemBranch.of(model)
    mask = branch.tokens.latent_mask(sequences)
    if not torch.is_tensor(invocations):
        invocations = splice_values(mask, invocations_of(invocations), branch.backbone.text_config.hidden_size)
    if len(invocations) != int(mask.sum()):
        raise KeepsightError(f"{int(mask.sum())} memory positions in the sequences, {len(invocations)} latents.")
    return scope.spliced(mask, invocations)


def splice_values(latent_mask: torch.Tensor, invocations: Invocations, width: int) -> torch.Tensor:
    """The latents of whole sequences, in the order in which their positions occur: [n, D].

    Args:
        latent_mask: bool [B, T], where the sequences hold latents.
        invocations: per row, in order.
        width: D, for sequences without memories.

    Raises:
        KeepsightError: if a row has other memories than its sequence.
    """
    if len(invocations) != len(latent_mask):
        raise KeepsightError(f"invocations of {len(invocations)} rows for {len(latent_mask)} sequences.")
    for row, (own, mask) in enumerate(zip(invocations, latent_mask, strict=True)):
        given, held = sum(len(i.latents) for i in own), int(mask.sum())
        if given != held:
            raise KeepsightError(
                f"Row {row} of the sequences holds the places of {held} latents, and its {len(own)} invocations bring "
                f"{given}. Give all of the sequence's memories, in their order: out.invocations of the output that the "
                "sequences come from."
            )
    latents = [invocation.latents for row in invocations for invocation in row]
    return torch.cat(latents) if latents else torch.zeros(0, width, device=latent_mask.device)
