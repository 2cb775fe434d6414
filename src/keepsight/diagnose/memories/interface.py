"""The one interface through which the diagnosis handles a memory, whatever its method.

`pvm.py` and `vismem.py` implement it. Another method joins by a subclass and one line in `find.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from keepsight.diagnose.memories.tampering import Contents

if TYPE_CHECKING:
    from keepsight.diagnose.reader import Reader

#: Where memories are formed in a text: (text tokens before it, type) of each, in order. Empty for PVM, which is
#: always there. Comparisons are paired because all of them have their memories at the same places.
Plan = tuple[tuple[int, str], ...]
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Placed:
    """A text with memories in it.

    Attributes:
        ids: [n'] what follows the prompt, memories included.
        slots: [n] where each text token stands in `ids`.
        starts: index in `ids` of each invocation token.
    """

    ids: torch.Tensor
    slots: torch.Tensor
    starts: tuple[int, ...]


class Memory(ABC):
    """What the diagnosis asks of a memory. All context managers act on the model it was made for, and undo it.

    As it stands here, a memory has one type, is there all along and needs no word said about it.

    Attributes:
        method: its name.
        layers: decoder layers that it works in; empty if it works between them.
        depends_on_text: its contents depend on the text as well as on the image.
        always_on: every token looks at it, so that it can be asked where each one looked; otherwise it is there only
            where it was invoked.
        sizes: type -> number of latents; empty if it has none.
        gates: decoder layer -> value of its gate, which began at 0; empty if it has none.
    """

    method: str
    layers: Sequence[int] = ()
    depends_on_text = False
    always_on = True
    sizes: Mapping[str, int] = MappingProxyType({})
    gates: Mapping[int, float] = MappingProxyType({})

    @abstractmethod
    def off(self) -> AbstractContextManager[Any]:
        """The model as if it had no memory."""

    def plan(self, reader: Reader, inputs: Inputs, text: torch.Tensor, scored: Sequence[tuple[int, int]]) -> Plan:
        """Where memories should be formed in a text [n] that is only read, given which of its tokens are scored."""
        return ()

    @abstractmethod
    def contents(self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan) -> Contents:
        """What is remembered of `inputs` while `text` [n] is read."""

    @abstractmethod
    def read(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> torch.Tensor:
        """Log-probabilities [n, V] of a text, with the memory's own contents or with others in their place."""

    @abstractmethod
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

    @abstractmethod
    def read_swapped(
        self, reader: Reader, inputs: Inputs, new: Inputs, text: torch.Tensor, cut: int, plan: Plan
    ) -> torch.Tensor:
        """Log-probabilities [n - cut, V] of the text from `cut` on, if from there only the memory is of `new`."""

    def other_type(self, plan: Plan) -> Plan | None:
        """The plan with every memory of the other type; None if there is but one type."""
        return None

    @abstractmethod
    def with_memories(
        self, reader: Reader, inputs: Inputs, text: torch.Tensor, plan: Plan, contents: Contents | None = None
    ) -> tuple[Placed, AbstractContextManager[Inputs]]:
        """The text with its memories, and a scope in which one forward of prompt and text has them in place."""

    def single_types(self) -> dict[str, Memory]:
        """The memory restricted to each of its types, if it has several that were trained."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of the diagnosis must know of this memory."""
        return []

    def writing_options(self) -> dict[str, Any]:
        """Arguments of `Reader.output` under which the model writes as its memory would have it."""
        return {}
