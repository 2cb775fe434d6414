"""What is measured of a trained method, the quickest first: the language, reading by length, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from studies.eye import lengths
from studies.eye.comparing import kept, memories, methods
from studies.eye.drawings.pictures import Pictures
from studies.eye.sizes import Size


def measure(
    trained: Any,
    tokenizer: Any,
    pictures: Pictures,
    size: Size,
    narrations: list[list[int]],
    trial: methods.Trial,
    found: dict[str, Any],
    keep: Callable[[], Any],
    images: int = 96,
    memory_images: int = 24,
    memory_longest: int = 1024,
    on_progress: Callable[[str, int, int], Any] = lambda *_: None,
) -> None:
    """Adds to `found` what it lacks of `language`, `rows` and (of a PVM) `memories`; for a validation, `rows` alone.

    Args:
        trained: as `methods.train` returns it; for `methods.NONE`, the eye.
        tokenizer: of the model.
        pictures: all drawings.
        size: of the eye.
        narrations: to be measured on.
        trial: what was trained.
        found: what has been measured already.
        keep: called whenever something is added.
        images: of each kind, for the rows.
        memory_images: of each kind, for the memories; 0 for none.
        memory_longest: longest narration for the memories.
        on_progress: called with what is measured, how much of it is done and of how much.
    """
    model = methods.bare(trained).eval()
    if "language" not in found and not trial.validation:
        found["language"] = [kept.measure(model, tokenizer, trial.name, shown, size) for shown in (None, pictures)]
        keep()
    if "rows" not in found:
        # the image repeated needs no training: the rival of all of them
        conditions = ("base", "hidden", *(["repeated"] if trial.method == methods.NONE else []))
        found["rows"] = lengths.measure(
            model, tokenizer, pictures, size, narrations, images, conditions, on_progress, trial.validation
        )
        keep()
    if "memories" not in found and memory_images and trial.method.startswith("pvm") and not trial.validation:
        off = trained.disable_adapter
        found["memories"] = memories.measure(
            model, off, tokenizer, pictures, size, narrations, memory_images, memory_longest, on_progress
        )
        keep()
