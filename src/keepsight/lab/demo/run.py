"""The demo: a VLM loses its image, gets it back, and the memory is put to the test. Every number is measured in the
run.

`run_demo` does the work and writes a folder::

    results.json                 all numbers
    report.html                  one self-contained page that explains them
    accuracy_by_length.png, attention_mass.png, causal.png
    example-1.png ...            images from the test set, to try `keepsight generate` on
    begun.txt                    a long text behind which only the memory reads the first of them
    adapter/                     the trained PVM, for `keepsight.load`

Nothing is written there before all numbers are in, so an interrupted run leaves no half of a result.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.checkpoints.atomic import try_folder
from keepsight.errors import KeepsightError
from keepsight.lab.demo.claims import verdict
from keepsight.lab.demo.methods import DemoSettings, as_measured, demo_study
from keepsight.lab.demo.seeds import compare
from keepsight.lab.pretraining import PRETRAINING_RECORD
from keepsight.lab.reference import REFERENCE_NAME, reference_path
from keepsight.lab.study.results import Results
from keepsight.lab.study.runs import PlannedCell, cells_to_run, run_cells, usable_cores, versions

FILES = (
    "results.json",
    "report.html",
    "accuracy_by_length.png",
    "attention_mass.png",
    "causal.png",
    "begun.txt",
    "adapter",
)
EXAMPLES = 3


OnProgress = Callable[[str, str, float], None]
"""Called as `on_progress(method, what is being done, share done)`."""
OnDone = Callable[[str, dict[str, Any]], None]
"""Called with a method and what was measured of it."""


class DemoOutputError(KeepsightError):
    """The demo cannot write where it was told to."""


def check_output(out: Path) -> None:
    """Find out before the work whether results can be written to `out`.

    Raises:
        DemoOutputError: `out` is a file, cannot be written, or holds files of these names that no demo wrote.
    """
    if out.exists() and not out.is_dir():
        raise DemoOutputError(f"{out} is a file; -o needs a folder.")
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not _is_former_demo(out / "results.json"):
        raise DemoOutputError(f"{out} holds {taken[0]}, which no earlier demo wrote. Choose another folder: -o DIR")
    try:
        try_folder(out)
    except OSError as error:
        raise DemoOutputError(f"{out} cannot be written ({error.strerror}). Choose another folder: -o DIR") from error


def _is_former_demo(results: Path) -> bool:
    try:
        return "train_length" in json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    *,
    quick: bool = False,
    workers: int | None = None,
    on_progress: OnProgress = lambda *_: None,
    on_done: OnDone = lambda *_: None,
) -> dict[str, Any]:
    """Run everything and write the folder `out`.

    Args:
        out: the folder; it appears with the results, not before.
        settings: default: the shipped base, seed 0.
        quick: recorded in the results.
        workers: processes; default: one per core, at most four.
        on_progress, on_done: told about methods.

    Returns:
        The content of `results.json`.
    """
    settings = settings or (DemoSettings.quick() if quick else DemoSettings())
    check_output(out)
    begin = time.perf_counter()
    workers = min(usable_cores(), 4) if workers is None else workers
    with tempfile.TemporaryDirectory(prefix="keepsight-demo-") as scratch:
        found = measure_all(settings, Path(scratch), workers, on_progress, on_done)
        results = assemble(found, settings, quick)
        results["study"] = compare(results)
        results["seconds"] = round(time.perf_counter() - begin, 1)
        results["conditions"] = conditions(workers)
        results = json.loads(json.dumps(results))  # what is returned is what is written, lists for tuples included
        write_folder(out, results, settings, Path(scratch))
    return results


def measure_all(
    settings: DemoSettings,
    folder: Path,
    workers: int,
    on_progress: OnProgress = lambda *_: None,
    on_done: OnDone = lambda *_: None,
) -> dict[str, dict[str, Any]]:
    """Run the demo's cells and return what was measured, by method. The first that fails stops the others.

    Args:
        settings: what to do.
        folder: for the cells' files and for adapters.
        workers: processes of one thread each; 0 or 1 does everything in this process.
        on_progress, on_done: called in this process.
    """
    found: dict[str, dict[str, Any]] = {}

    def finish(cell: PlannedCell, result: dict[str, Any] | Exception) -> None:
        if isinstance(result, Exception):
            raise result
        found[cell.row] = result["facts"]
        on_done(cell.row, result["facts"])

    todo = cells_to_run([demo_study(settings)], folder / "cells", folder)
    run_cells(todo, workers, finish, lambda cell, what, share: on_progress(cell.row, what, share))
    return found


def assemble(found: dict[str, dict[str, Any]], settings: DemoSettings, quick: bool) -> dict[str, Any]:
    """Put together what was measured: one entry per method, and what they share."""
    regime, note = describe_regime(settings.base)
    results: dict[str, Any] = {
        "regime": regime,
        "regime_note": note,
        "seed": settings.seed,
        "quick": quick,
        "split": settings.split,
        "train_length": settings.plan.train_length,
        "lengths": list(settings.lengths),
        "base_checkpoint": REFERENCE_NAME if settings.base is None else settings.base.name,
        "plan": settings.plan.as_dict(),
        "measure": (
            "Teacher-forced accuracy of the most probable token over the whole vocabulary at the last six digits of "
            "each "
            "narration; length is the number of generated tokens."
        ),
    }
    for name in ("base", "pvm", "lora", "mlp", "pvm_plain", "lora_long"):
        if name in found:
            results[name] = found[name]
    cells = {name: {settings.seed: asdict(as_measured(facts))} for name, facts in found.items()}
    judged = verdict(Results(cells, dict.fromkeys(settings.rows_of_study, (settings.seed,))))
    return results | {"verdict": judged} if judged else results


def describe_regime(base: Path | None) -> tuple[str, str]:
    """What the base's fall in long outputs is mostly made of, by how it was pretrained."""
    folder = reference_path() if base is None else base
    try:
        record = json.loads((folder / PRETRAINING_RECORD).read_text(encoding="utf-8"))
        max_jump = record["config"]["max_jump"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown", "The base does not say how it was pretrained. Judge by the masked-filler control."
    if max_jump:
        return "pure_dilution", (
            f"Positions were randomised in pretraining (jumps of up to {max_jump:,}), so large distances are nothing "
            f"new to the "
            "base; what it loses in long outputs, it loses to the number of text keys. The masked-filler control "
            "checks this."
        )
    return "rotary_range", (
        "The base has only seen short positions in pretraining, so most of its fall in long outputs is one of rotary "
        "range and not "
        "of dilution. Claims about dilution need a base with randomised positions, such as the shipped one."
    )


def conditions(workers: int) -> dict[str, Any]:
    """The machine and the versions, without names of machine or user."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": "cpu",
        "dtype": "float32",
        "cores": usable_cores(),
        "workers": workers,
        "threads_per_worker": 1,
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **versions(),
    }


def write_folder(out: Path, results: dict[str, Any], settings: DemoSettings, folder: Path) -> None:
    """Make everything beside `out`, then move it in, `results.json` last."""
    from keepsight.lab.demo.plots import plot_all
    from keepsight.lab.demo.report import render_report
    from keepsight.lab.demo.trying import try_it
    from keepsight.lab.samples import example_images, sample_narration

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=out) as part_name:
        part = Path(part_name)
        images = example_images(EXAMPLES, settings.seed)
        for index, (image, _) in enumerate(images, start=1):
            image.resize((256, 256), resample=0).save(part / f"example-{index}.png")  # 0: nearest, pixels stay pixels
        figures = plot_all(results, part)
        if (folder / "pvm").is_dir():
            shutil.copytree(folder / "pvm", part / "adapter")
            results["try_it"] = try_it(
                part / "adapter",
                part / "example-1.png",
                images[0][1],
                settings.lengths[-1],
                part / "begun.txt",
                settings.seed,
            )
        narration = sample_narration(np.random.default_rng(settings.seed), settings.seed)
        (part / "report.html").write_text(render_report(results, figures, images, narration), encoding="utf-8")
        (part / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        for path in sorted(part.iterdir(), key=lambda p: p.name == "results.json"):
            target = out / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
