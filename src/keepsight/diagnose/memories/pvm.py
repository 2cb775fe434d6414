"""PVM through the diagnosis' interface."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from keepsight.compat import cache_argument, find_output_cache
from keepsight.diagnose.instruments.retrieval import reading_branches
from keepsight.diagnose.memories.interface import Inputs, Memory, Placed, Plan
from keepsight.diagnose.memories.tampering import Contents, stretched
from keepsight.pvm import memory_off, replace_memory, swap_memory

if TYPE_CHECKING:
    from keepsight.diagnose.reader import Reader


class PvmHandle(Memory):
    """PVM through the interface.

    Args:
        model: a model with at least one active PVM block that reads a memory.
    """

    method = "PVM"

    def __init__(self, model: Any):
        self.model = model
        branches = {branch.index: branch for branch in reading_branches(model)}
        self.layers = sorted(branches)
        self.gates = {
            index: max((block.gate.item() for _, block in branches[index].active_blocks if block.reads_memory), key=abs)
            for index in self.layers
        }

    def off(self) -> AbstractContextManager[Any]:
        """See `Memory.off`."""
        return memory_off(self.model)

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

    def with_memories(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> tuple[Placed, AbstractContextManager[Inputs]]:
        """See `Memory.with_memories`: nothing stands in the text."""
        return Placed(text, torch.arange(len(text)), ()), self._entered(reader.with_text(inputs, text), contents)

    @contextmanager
    def _entered(self, longer: Inputs, contents: Contents | None) -> Iterator[Inputs]:
        with self._given(contents):
            yield longer

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


@contextmanager
def remembered() -> Any:
    """Collects what a PVM remembers inside the block: a list of tensors [B, M, D]."""
    seen: Contents = []

    def note(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        seen.append(embeds.detach().clone())
        return embeds

    with replace_memory(note):
        yield seen
