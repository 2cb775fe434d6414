"""Running studies: one small JSON per finished cell, so that a run may be killed at any time and goes on where it was.

A cell's file holds its settings. When a study changes, files of other settings no longer count and their cells are run
again; nothing is mixed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.checkpoints.atomic import write_text
from keepsight.lab.study.results import Results
from keepsight.lab.study.study import Bench, Cell, Study, StudyError

_TURN = 0.2  # seconds between two looks at what workers say
_THREADS = "OMP_NUM_THREADS"
_SAID: Any = None  # in a worker process: where it says how far it is


@dataclass(frozen=True)
class PlannedCell:
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


OnProgress = Callable[[PlannedCell, str, float], None]
"""Called as `on_progress(cell, what is being done, share done)`."""
OnDone = Callable[[PlannedCell, "dict[str, Any] | Exception"], None]
"""Called with a cell and its record, or with what it failed of."""


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


def cells_to_run(
    studies: Sequence[Study], folder: Path, work: Path, *, seeds: int | None = None, again: bool = False
) -> list[PlannedCell]:
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
                found.append(PlannedCell(study.name, row.name, seed, study.cell, settings, file, work))
    return found


def run_cell(planned: PlannedCell, report: Callable[[str, float], None] = lambda what, share: None) -> dict[str, Any]:
    """Run one cell on one thread and write its file, whole or not at all."""
    from keepsight.lab.pretraining import one_thread

    wall, cpu = time.perf_counter(), time.process_time()
    with one_thread():
        measured = planned.cell(Bench(planned.work, report), planned.settings, planned.seed)
    record = {
        "study": planned.study,
        "row": planned.row,
        "seed": planned.seed,
        "values": {key: round(float(value), 5) for key, value in measured.values.items()},
        "n": measured.n,
        "facts": as_json(dict(measured.facts)),
        "settings": planned.settings,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "versions": versions(),
    }
    write_json(planned.file, record)
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


def run_cells(
    todo: Sequence[PlannedCell],
    workers: int = 1,
    on_done: OnDone = lambda cell, result: None,
    on_progress: OnProgress = lambda cell, what, share: None,
) -> None:
    """Run cells, in this process or in several. A cell that fails is told to `on_done` and the others go on.

    Args:
        todo: cells, in order.
        workers: processes of one thread each; 0 or 1 is this process.
        on_done: called after every cell; what it raises stops the run, and no process is left.
        on_progress: called within cells.

    Raises:
        StudyError: a worker process was killed.
    """
    if workers > 1:
        with _OneThreadEach():
            _in_processes(todo, workers, on_done, on_progress)
        return
    for cell in todo:
        result: dict[str, Any] | Exception
        try:
            result = run_cell(cell, functools.partial(on_progress, cell))
        except Exception as error:
            result = error
        on_done(cell, result)


def _in_processes(todo: Sequence[PlannedCell], workers: int, on_done: OnDone, on_progress: OnProgress) -> None:
    context = multiprocessing.get_context("spawn")  # a forked torch can hang on its thread pools
    said = context.Queue()
    pool = ProcessPoolExecutor(min(workers, max(1, len(todo))), context, _start_worker, (said,))
    waiting = iter(enumerate(todo))
    try:
        running = {pool.submit(_run_in_worker, *entry): entry[1] for entry in itertools.islice(waiting, workers)}
        while running:
            done = wait(running, timeout=_TURN, return_when=FIRST_COMPLETED).done
            with contextlib.suppress(queue.Empty):
                while True:
                    number, what, share = said.get_nowait()
                    if todo[number] in running.values():  # what comes late is not told
                        on_progress(todo[number], what, share)
            for future in done:
                cell, error = running.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):  # of all that were running; which one it was, is not known
                    names = " or ".join(sorted(c.name for c in (cell, *running.values())))
                    raise StudyError(
                        f"A worker process ended in {names} (killed for memory, perhaps). Try fewer: --workers 1"
                    ) from error
                if error is not None and not isinstance(error, Exception):
                    raise error
                on_done(cell, future.result() if error is None else error)
                running |= {pool.submit(_run_in_worker, *entry): entry[1] for entry in itertools.islice(waiting, 1)}
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


class _OneThreadEach:
    """Inside, a new process inherits that its torch starts with one thread."""

    def __enter__(self) -> None:
        self.former = os.environ.get(_THREADS)
        os.environ[_THREADS] = "1"

    def __exit__(self, *_: object) -> None:
        if self.former is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = self.former


def _start_worker(said: Any) -> None:
    """Ctrl-C reaches the whole group; the parent decides. Libraries stay quiet."""
    import warnings

    import transformers

    global _SAID
    _SAID = said
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)


def _run_in_worker(number: int, cell: PlannedCell) -> dict[str, Any]:
    return run_cell(cell, lambda what, share: _SAID.put((number, what, share)))


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
