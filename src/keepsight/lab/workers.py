"""Running the demo's jobs in a few processes, with progress that moves and a Ctrl-C that leaves nothing running."""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepsight.lab.jobs import Settings, run_job

OnProgress = Callable[[str, str, float], None]
"""Called as `on_progress(job, what is being done, share done)`."""
OnDone = Callable[[str, dict[str, Any]], None]
"""Called with a job's name and its result."""


class WorkerError(RuntimeError):
    """A job failed; the message holds its traceback."""


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_jobs(
    settings: Settings, workdir: Path, workers: int, on_progress: OnProgress, on_done: OnDone
) -> dict[str, dict[str, Any]]:
    """Do all jobs of `settings` and return their results by name.

    Args:
        settings: what to do.
        workdir: folder for adapters.
        workers: processes of one thread each; 0 does everything in this process.
        on_progress, on_done: called in this process.

    Raises:
        WorkerError: a job failed; the others are stopped.
    """
    if workers == 0:
        results = {}
        for name in settings.jobs:
            results[name] = run_job(name, settings, workdir, functools.partial(on_progress, name))
            on_done(name, results[name])
        return results
    return _in_processes(settings, workdir, min(workers, len(settings.jobs)), on_progress, on_done)


def _in_processes(
    settings: Settings, workdir: Path, workers: int, on_progress: OnProgress, on_done: OnDone
) -> dict[str, dict[str, Any]]:
    context = multiprocessing.get_context("spawn")  # a forked torch can hang on its thread pools
    todo, messages = context.Queue(), context.Queue()
    for name in settings.jobs:
        todo.put(name)
    for _ in range(workers):
        todo.put(None)
    processes = [
        context.Process(target=_work, args=(todo, messages, settings, workdir), daemon=True) for _ in range(workers)
    ]
    former = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers: their torch starts with one thread
    results: dict[str, dict[str, Any]] = {}
    try:
        for process in processes:
            process.start()
        while len(results) < len(settings.jobs):
            try:
                kind, name, payload = messages.get(timeout=1.0)
            except queue.Empty:
                dead = [p for p in processes if p.exitcode not in (None, 0)]
                if dead:
                    raise WorkerError(
                        f"A worker process ended with status {dead[0].exitcode} (killed for memory, perhaps). "
                        "Try fewer workers: --workers 1"
                    ) from None
                continue
            if kind == "progress":
                on_progress(name, *payload)
            elif kind == "done":
                results[name] = payload
                on_done(name, payload)
            else:
                raise WorkerError(f"The job {name!r} failed:\n{payload}")
    finally:
        if former is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = former
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join(timeout=5)
    return results


def _work(todo: Any, messages: Any, settings: Settings, workdir: Path) -> None:
    """A worker process: do jobs until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    name = "start"
    try:
        import warnings

        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore", FutureWarning)
        while (name := todo.get()) is not None:
            result = run_job(name, settings, workdir, functools.partial(_send_progress, messages, name))
            messages.put(("done", name, result))
    except BaseException:
        messages.put(("failed", name, traceback.format_exc()))


def _send_progress(messages: Any, name: str, what: str, share: float) -> None:
    messages.put(("progress", name, (what, share)))
