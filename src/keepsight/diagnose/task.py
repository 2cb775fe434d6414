"""Tasks with known facts, for models that were made for them: what the diagnosis asks where no data are given.

The laboratory's digit grids are one (`keepsight.lab.cases`). The diagnosis knows none by name: who calls it brings one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from keepsight.diagnose.cases import Case


@dataclass(frozen=True)
class KnownImages:
    """A batch of images, all with a text of the same length after the prompt.

    Attributes:
        inputs: model inputs of the prompts, B rows on the CPU.
        text: [B, n] what follows them.
        facts: [B, Q] what is known of each image, as whole numbers.
    """

    inputs: dict[str, torch.Tensor]
    text: torch.Tensor
    facts: np.ndarray


class KnownTask(Protocol):
    """A task whose facts are known.

    Attributes:
        prompt: what is asked.
        temperature: of the outputs that are written.
        exact: outputs are held open to their full length, because they would end before there is anything to see.
        lengths: tokens of output at which the score is read.
        about: one sentence on the images and references, for the report.
    """

    prompt: str
    temperature: float
    exact: bool
    lengths: tuple[int, ...]
    about: str

    def causal_length(self, method: str | None) -> int:
        """Tokens of output before the answers of the causal table, for a memory of this method or for none."""
        ...

    def cases(self, count: int, length: int, seed: int) -> list[Case]:
        """Cases with their answers near `length` tokens of output.

        Raises:
            ImportError: if the images need a package that is not installed.
        """
        ...

    def images(self, rows: int, test: bool, seed: list[int]) -> KnownImages:
        """Images with what is known of them; for testing, such as no training has seen."""
        ...

    def questions(self, facts: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """What to ask of images: names, and labels [B, F] from facts [B, Q], -1 where it cannot be asked."""
        ...
