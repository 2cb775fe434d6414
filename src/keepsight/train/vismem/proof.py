"""The proof at the end of a run: what was to stay did stay, to the bit, and what was trained is finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from keepsight.errors import KeepsightError
from keepsight.train.run import output
from keepsight.train.run.checksums import changed, checksums
from keepsight.train.run.trainer import TrainingDivergedError
from keepsight.train.vismem.stage import Stage


def prove(
    model: Any,
    trained: dict[str, torch.nn.Parameter],
    before: dict[str, str] | None,
    start: dict[str, str] | None,
    stage: Stage,
    folder: Path,
) -> tuple[int, int]:
    """(tensors of which no bit changed, trained tensors that changed); raises if anything else did."""
    after, end = checksums(model, skip=set(trained)), checksums(Only(trained))
    assert before is not None
    assert after is not None
    assert start is not None
    assert end is not None
    wrong = changed(before, after)
    if wrong:
        raise KeepsightError(
            f"{len(wrong)} tensors that {stage.title} must not change did change, such as {wrong[0]}; nothing was "
            f"saved. This must never happen: please report it with the settings in {folder / output.RECORD}."
        )
    broken = [name for name, p in trained.items() if not bool(p.isfinite().all())]
    if broken:
        raise TrainingDivergedError(
            f"After the last step {len(broken)} tensors hold NaN or infinite values, such as {broken[0]}; the result "
            "was not saved. Earlier checkpoints stay. Try a lower learning rate."
        )
    return len(after), len(changed(start, end))


class Only(torch.nn.Module):
    """A module that holds some parameters under their names, to take checksums of."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]):
        super().__init__()
        self.held = parameters

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Under the names they have in the model."""
        yield from self.held.items()
