"""The memory that a model carries."""

from __future__ import annotations

from typing import Any, Literal

from keepsight.diagnose.instruments.retrieval import reading_branches
from keepsight.diagnose.memories.interface import Memory
from keepsight.diagnose.memories.invoked import active_latent_memory
from keepsight.diagnose.memories.pvm import PvmHandle
from keepsight.diagnose.memories.vismem import VisMemHandle


def memory_of(
    model: Any, method: Literal["auto", "PVM", "VisMem"] = "auto", seed: int = 0, kind: str = "auto"
) -> Memory | None:
    """The memory that a model carries, or None.

    Args:
        model: a supported VLM.
        method: which one to look for; "auto" takes PVM of a model that carries both.
        seed: VisMem: of policies that invoke at random.
        kind: VisMem: which type is formed where a text is only read (see `VisMemHandle`).
    """
    if method in ("auto", "PVM") and reading_branches(model):
        return PvmHandle(model)
    if method in ("auto", "VisMem") and active_latent_memory(model) is not None:
        return VisMemHandle(model, seed, kind)
    return None


def carries_both(model: Any) -> bool:
    """Whether PVM and VisMem are both there and switched on."""
    return bool(reading_branches(model)) and active_latent_memory(model) is not None
