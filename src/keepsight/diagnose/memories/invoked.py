"""Invocations in generated sequences: parse them, force them elsewhere, replace their latents."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from keepsight.diagnose.memories.interface import Plan
from keepsight.diagnose.memories.tampering import Contents, stretched
from keepsight.vismem import MemoryPolicy, VisMemBranch, replace_latents
from keepsight.vismem.tokens import MemoryTokens


def active_latent_memory(model: Any) -> VisMemBranch | None:
    """The `VisMemBranch` of a model whose latent memory is switched on, or None."""
    try:
        branch = next((m for m in model.modules() if isinstance(m, VisMemBranch)), None)
    except AttributeError:
        return None
    return branch if branch is not None and branch.active is not None else None


def forced(plan: Plan) -> MemoryPolicy:
    """The policy that invokes at the places of a plan and nowhere else."""
    return MemoryPolicy("forced", at=dict(plan)) if plan else MemoryPolicy("off")


def given(contents: Contents | None) -> AbstractContextManager[Any]:
    """Generation with latents of our own: the first memory gets the first, and so on; further ones are formed."""
    if contents is None:
        return nullcontext()
    left = list(contents)

    def change(kind: str, latents: torch.Tensor) -> torch.Tensor:
        return stretched(left.pop(0), latents.shape[1]).to(latents).expand_as(latents) if left else latents

    return replace_latents(change)


def parsed(ids: torch.Tensor, tokens: MemoryTokens) -> tuple[torch.Tensor, Plan]:
    """The text [n] of an output [n'], and where memories were formed in it. A memory cut off by the end is none."""
    invokes = set(tokens.invoke.values())
    kinds = {end: kind for kind, end in tokens.end.items()}
    listed = ids.tolist()
    text = [i for i in listed if i not in tokens.ids]
    before = np.cumsum([i not in tokens.ids for i in listed])
    plan = [
        (int(before[at]), kinds[listed[at + 1]])  # the end tokens tell the type that was formed
        for at, token in enumerate(listed[:-1])
        if token in invokes and listed[at + 1] in kinds
    ]
    return torch.tensor(text, dtype=ids.dtype), tuple(plan)
