"""What a VisMem run leaves on disk: checkpoints that are whole or absent, the final adapter, its card, its metrics."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from keepsight.checkpoints.atomic import new_folder, write_text
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.run import output
from keepsight.train.vismem.stages import POLICY

TRAINED = "trained.safetensors"
STATE = "trainer_state.json"
METRICS = "metrics.jsonl"
Save = Callable[[Path], None]
"""Writes what was trained, and the processor, into a folder."""


def save_adapter(model: Any, policy: Any, processor: Any, folder: Path) -> None:
    """Write the memory, the policy's LoRA (in the folder `policy`) if there is one, and the processor."""
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    if policy is not None:
        policy.save_pretrained(str(folder), selected_adapters=[POLICY])
    for card in folder.rglob("README.md"):
        card.unlink()  # PEFT's, which says nothing


def save_checkpoint(trainer: Any, save: Save, folder: Path, keep: int | None) -> Path:
    """Write `checkpoint-<step>`, which appears whole, and delete the oldest ones over `keep`."""
    target = folder / f"checkpoint-{trainer.progress.step}"
    tensors, rest = trainer.state()
    with new_folder(target) as fresh:
        save(fresh)
        save_file(tensors, fresh / TRAINED)
        (fresh / STATE).write_text(
            json.dumps({"global_step": trainer.progress.step, "progress": rest}, indent=2) + "\n"
        )
    if keep is not None:
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for old in found[: max(0, len(found) - keep)]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def restore(trainer: Any, checkpoint: Path) -> None:
    """Go on from a checkpoint.

    Raises:
        KeepsightError: if its tensors are not those that this run trains.
    """
    try:
        tensors = load_file(checkpoint / TRAINED)
        progress = json.loads((checkpoint / STATE).read_text())["progress"]
    except (OSError, ValueError, KeyError) as error:
        raise KeepsightError(
            f"{checkpoint} cannot be resumed from ({type(error).__name__}: {error}). Delete it, and --resume takes the "
            "one before."
        ) from error
    trainer.restore(tensors, progress)


def save_final(save: Save, folder: Path, card: str) -> None:
    """Write what was trained, processor and card into the output folder, every file in one step."""
    with new_folder(folder / ".final") as fresh:
        save(fresh)
        (fresh / "README.md").write_text(card)
    final = folder / ".final"
    if (final / POLICY).is_dir():
        shutil.rmtree(folder / POLICY, ignore_errors=True)
        os.replace(final / POLICY, folder / POLICY)
    output.put_in_place(final, folder)


def clear_halves(folder: Path) -> None:
    """Delete what killed runs left half-written."""
    for half in (*folder.glob(".checkpoint-*.part"), *folder.glob("..final.*.part"), folder / ".final"):
        shutil.rmtree(half, ignore_errors=True)


def append_metrics(folder: Path, step: int, values: dict[str, float]) -> None:
    """Add one line to metrics.jsonl."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run takes again."""
    file = folder / METRICS
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # the last line of a killed run
    write_text(file, "".join(f"{line}\n" for line in kept))


def warn_of_no_signal(folder: Path, invokes: bool) -> None:
    """Warn of a run whose rewards or memories, by its metrics, can have taught nothing; controls invoke none."""
    file = folder / METRICS
    steps = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if invokes and steps and all(step.get("invoked") == 0 for step in steps):
        why = (
            "no memory was invoked in any step, so none learned. In stage I raise --delimiter-probability "
            "and --anywhere-probability (or check that texts have delimiters), in stage II --start-bias"
        )
    elif steps and all(step.get("groups_without_signal") == 1 for step in steps):
        why = (
            "in no step did the rewards of a question's trajectories differ, so they taught nothing. Look at what is "
            "written and scored, raise --temperature or --group-size, or take questions that are answered sometimes"
        )
    else:
        return
    warnings.warn(f"{folder}: {why}.", KeepsightWarning, stacklevel=2)
