"""Running studies: one small JSON per finished cell, so that a run may be killed at any time and goes on where it was.

A cell's file holds its settings. When a study changes, files of other settings no longer count and their cells are run
again; nothing is mixed.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.checkpoints.atomic import write_text
from studies.study import Bench, Cell, Study, StudyError
from studies.study_results import Results


@dataclass(frozen=True)
class Task:
    """One cell to run; plain data and one importable function, so that it can be sent to a process."""

    study: str
    row: str
    seed: int
    cell: Cell
    settings: dict[str, Any]
    file: Path
    work: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.study} / {self.row} / seed {self.seed}"


OnProgress = Callable[[Task, str, float], None]
OnDone = Callable[[Task, "dict[str, Any] | str"], None]
"""Called with a task and its record, or the traceback of its failure."""


def cell_file(folder: Path, study: str, row: str, seed: int) -> Path:
    """Where a cell's result stands."""
    return folder / study / f"{row}-{seed}.json"


def read_cell(file: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished cell, or None if it is missing or was made with other settings."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StudyError(f"{file} is no result of a cell ({error}). Delete it and run the study again.") from error
    return record if record.get("settings") == as_json(dict(settings)) else None


def as_json(value: Any) -> Any:
    """What comes back when `value` is written as JSON and read again: lists for tuples, strings for keys."""
    return json.loads(json.dumps(value))


def read_results(study: Study, folder: Path, studies: Mapping[str, Study]) -> Results:
    """All finished cells of a study; rows that are the same as another study's are read there.

    Args:
        study: the study.
        folder: of all results.
        studies: by name, for `Row.same_as`.
    """
    cells: dict[str, dict[int, Any]] = {}
    expected = {}
    for row in study.rows:
        source, there = study, row
        if row.same_as is not None:
            source = studies[row.same_as[0]]
            there = source.row(row.same_as[1])
        expected[row.name] = there.seeds or source.seeds
        for seed in expected[row.name]:
            record = read_cell(cell_file(folder, source.name, there.name, seed), source.settings_of(there))
            if record is not None:
                cells.setdefault(row.name, {})[seed] = record
    return Results(cells, expected)


def tasks(
    studies: Sequence[Study], folder: Path, work: Path, *, seeds: int | None = None, again: bool = False
) -> list[Task]:
    """Cells that are still to be run, study by study.

    Args:
        studies: which ones.
        folder: where results are.
        work: for what can be made again.
        seeds: only the first so many seeds of each row.
        again: also those that are finished.
    """
    found = []
    for study in studies:
        for row, seed in study.cells():
            if seeds is not None and seed not in (row.seeds or study.seeds)[:seeds]:
                continue
            settings = as_json(study.settings_of(row))
            file = cell_file(folder, study.name, row.name, seed)
            if again or read_cell(file, settings) is None:
                found.append(Task(study.name, row.name, seed, study.cell, settings, file, work))
    return found


def run_task(task: Task, report: Callable[[str, float], None] = lambda what, share: None) -> dict[str, Any]:
    """Run one cell on one thread and write its file, whole or not at all."""
    from keepsight.lab.pretraining import one_thread

    wall, cpu = time.perf_counter(), time.process_time()
    with one_thread():
        outcome = task.cell(Bench(task.work, report), task.settings, task.seed)
    record = {
        "study": task.study,
        "row": task.row,
        "seed": task.seed,
        "values": {key: round(float(value), 5) for key, value in outcome.values.items()},
        "n": outcome.n,
        "facts": as_json(dict(outcome.facts)),
        "settings": task.settings,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "versions": versions(),
    }
    write_json(task.file, record)
    return record


def write_json(file: Path, record: Any) -> None:
    """Write one finished cell, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of what the numbers were made with."""
    import peft
    import torch
    import transformers

    import keepsight

    found = {"keepsight": keepsight, "torch": torch, "transformers": transformers, "peft": peft}
    return {name: module.__version__ for name, module in found.items()}


def run_tasks(
    todo: Sequence[Task],
    workers: int = 1,
    on_done: OnDone = lambda task, result: None,
    on_progress: OnProgress = lambda task, what, share: None,
) -> None:
    """Run cells, in this process or in several. A cell that fails is reported and the others go on.

    Args:
        todo: cells, in order.
        workers: processes of one thread each; 1 is this process.
        on_done: called after every cell.
        on_progress: called within cells; only in this process.
    """
    if workers <= 1:
        for task in todo:
            try:
                on_done(task, run_task(task, functools.partial(on_progress, task)))
            except Exception:
                on_done(task, traceback.format_exc())
        return
    former = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited: the workers' torch starts with one thread
    context = multiprocessing.get_context("spawn")  # a forked torch can hang on its thread pools
    pool = ProcessPoolExecutor(min(workers, max(1, len(todo))), mp_context=context, initializer=_start_worker)
    try:
        waiting = iter(todo)
        running = {pool.submit(run_task, task): task for task in itertools.islice(waiting, workers)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise StudyError(f"A worker process ended in {task.name} (killed for memory, perhaps).") from error
                on_done(task, future.result() if error is None else "".join(traceback.format_exception(error)))
                running |= {pool.submit(run_task, task): task for task in itertools.islice(waiting, 1)}
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        if former is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = former


def _start_worker() -> None:
    """Ctrl-C reaches the whole group; the parent decides. Libraries stay quiet."""
    import warnings

    import transformers

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)
