"""The one interface through which the diagnosis handles a memory, whatever its method. PVM implements it here.

VisMem implements it in `latents.py`. Another method joins by a class with the same members and one line in `memory_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from keepsight.compat import cache_argument, find_output_cache
from keepsight.diagnose.memories.tampering import Contents, stretched
from keepsight.pvm import memory_off, replace_memory, swap_memory
from keepsight.pvm.tuner import PvmBranch

if TYPE_CHECKING:
    from keepsight.diagnose.reader import Reader

#: Where memories are formed in a text: (text tokens before it, type) of each, in order. Empty for PVM, which is
#: always there. Comparisons are paired because all of them have their memories at the same places.
Plan = tuple[tuple[int, str], ...]
Inputs = dict[str, torch.Tensor]


class Memory(Protocol):
    """What the diagnosis asks of a memory. All context managers act on the model it was made for, and undo it.

    Attributes:
        method: its name.
        layers: decoder layers that it works in; empty if it works between them.
        depends_on_text: its contents depend on the text as well as on the image.
    """

    method: str
    layers: list[int]
    depends_on_text: bool

    def off(self) -> AbstractContextManager[Any]:
        """The model as if it had no memory."""
        ...

    def plan(self, reader: Reader, inputs: Inputs, text: torch.Tensor, scored: Sequence[tuple[int, int]]) -> Plan:
        """Where memories should be formed in a text [n] that is only read, given which of its tokens are scored."""
        ...

    def contents(self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan) -> Contents:
        """What is remembered of `inputs` while `text` [n] is read."""
        ...

    def read(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> torch.Tensor:
        """Log-probabilities [n, V] of a text, with the memory's own contents or with others in their place."""
        ...

    def write(
        self, reader: Reader, inputs: Inputs, steps: int, plan: Plan | None = None, contents: Contents | None = None
    ) -> tuple[torch.Tensor, Plan]:
        """What the model writes [n] with its memory, and where memories were formed.

        Args:
            reader: the model.
            inputs: of the prompt.
            steps: text tokens.
            plan: form memories there and nowhere else; None leaves it to the model.
            contents: in place of what is remembered.
        """
        ...

    def read_swapped(
        self, reader: Reader, inputs: Inputs, new: Inputs, text: torch.Tensor, cut: int, plan: Plan
    ) -> torch.Tensor:
        """Log-probabilities [n - cut, V] of the text from `cut` on, if from there only the memory is of `new`."""
        ...

    def other_type(self, plan: Plan) -> Plan | None:
        """The plan with every memory of the other type; None if there is but one type."""
        ...


class PvmHandle:
    """PVM through the interface.

    Args:
        model: a model with at least one active PVM block that reads a memory.
    """

    method = "PVM"
    depends_on_text = False

    def __init__(self, model: Any):
        self.model = model
        self.layers = sorted(branch.index for branch in reading_branches(model))

    def off(self) -> AbstractContextManager[Any]:
        """See `Memory.off`."""
        return memory_off(self.model)

    def plan(self, reader: Reader, inputs: Inputs, text: torch.Tensor, scored: Sequence[tuple[int, int]]) -> Plan:
        """Nowhere: it is there all along."""
        return ()

    def contents(self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan) -> Contents:
        """See `Memory.contents`; the text has no part in it."""
        with remembered() as seen:
            reader.read(inputs, inputs["input_ids"][0, -1:].cpu())
        return seen

    def read(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> torch.Tensor:
        """See `Memory.read`."""
        with self._given(contents):
            return reader.read(inputs, text)

    def write(
        self, reader: Reader, inputs: Inputs, steps: int, plan: Plan | None = None, contents: Contents | None = None
    ) -> tuple[torch.Tensor, Plan]:
        """See `Memory.write`."""
        with self._given(contents):
            return reader.write(inputs, steps), ()

    @torch.no_grad()
    def read_swapped(
        self, reader: Reader, inputs: Inputs, new: Inputs, text: torch.Tensor, cut: int, plan: Plan
    ) -> torch.Tensor:
        """See `Memory.read_swapped`: only the memory in the cache is exchanged."""
        model = self.model
        donor = find_output_cache(model(**new, use_cache=True, logits_to_keep=1))
        # the new image first: some models keep the position offset of the last prompt that they read
        begun = model(**reader.with_text(inputs, text[:cut]), use_cache=True, logits_to_keep=1)
        cache = find_output_cache(begun)
        swap_memory(cache, donor)
        logits = [begun.logits[0, -1:]]
        rest = text[cut:-1].to(logits[0].device)[None]
        if rest.shape[1]:
            # no attention mask: a single row has no padding, and Qwen would take a mask of all slots for all positions
            out = model(input_ids=rest, use_cache=True, **cache_argument(model, cache))
            logits.append(out.logits[0])
        return reader.log_probabilities(torch.cat(logits))

    def other_type(self, plan: Plan) -> Plan | None:
        """None: there is one type."""
        return None

    @contextmanager
    def _given(self, contents: Contents | None) -> Any:
        if contents is None:
            yield
            return
        calls = [0]  # a prompt may bring its images in several calls

        def change(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
            part = contents[calls[0] % len(contents)]
            calls[0] += 1
            return stretched(part, embeds.shape[1]).to(embeds).expand_as(embeds)

        with replace_memory(change):
            yield


def reading_branches(model: Any) -> list[PvmBranch]:
    """The PVM branches that are switched on and look at a memory (the control's parallel MLP does not)."""
    found = [module for module in model.modules() if isinstance(module, PvmBranch)]
    return [branch for branch in found if any(block.reads_memory for _, block in branch.active_blocks)]


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
    from keepsight.diagnose.memories.latents import VisMemHandle, active_latent_memory

    if method in ("auto", "PVM") and reading_branches(model):
        return PvmHandle(model)
    if method in ("auto", "VisMem") and active_latent_memory(model) is not None:
        return VisMemHandle(model, seed, kind)
    return None


@contextmanager
def remembered() -> Any:
    """Collects what a PVM remembers inside the block: a list of tensors [B, M, D]."""
    seen: Contents = []

    def note(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        seen.append(embeds.detach().clone())
        return embeds

    with replace_memory(note):
        yield seen
