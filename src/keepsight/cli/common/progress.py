"""Progress of a long command: bars on a terminal; elsewhere a line per stage, and one every 20 seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from keepsight.cli.common import console
from keepsight.cli.common.console import err, say
from keepsight.words import duration

EVERY = 20.0
"""Seconds without a line after which one is written, where stderr is no terminal."""


class Progress:
    """`with Progress("the demo") as show: show("PVM", 0.3, 1, "training")`.

    On a terminal every stage is a bar. Elsewhere, in a log file, a line tells of what runs whenever nothing has been
    said for a while. It comes from a thread of its own: a stage may compute for minutes without a word.

    Args:
        what: the whole, for these lines.
        announce: write a line at the beginning of every stage too, where stderr is no terminal.
        transient: bars vanish when all stages are done.
        every: seconds without a line.
    """

    def __init__(self, what: str, *, announce: bool = False, transient: bool = False, every: float = EVERY):
        self.what, self.announce, self.transient, self.every = what, announce, transient, every
        self.stages: dict[str, str] = {}  # stages that are not finished -> how far they are
        self.known: set[str] = set()
        self.bars: Any = None
        self.tasks: dict[str, Any] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._tell, daemon=True)
        self.begin = time.monotonic()

    def __enter__(self) -> Progress:
        if not err.is_terminal:
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, stage: str, done: float, total: float, note: str = "") -> None:
        """So much of a stage is done; a total of 1 is a share."""
        count = f"{done / total:.0%}" if total == 1 else f"{done:,.0f}/{total:,.0f}"
        if err.is_terminal:
            self._draw(stage, done, total, count, note)
        elif self.announce and stage not in self.known:
            say(f"{stage} ...")
        self.known.add(stage)
        self.stages[stage] = " ".join(part for part in (stage, note, count) if part)
        if done >= total:
            del self.stages[stage]

    def end(self) -> None:
        """Say no more."""
        self.ended.set()

    def at(self, place: str) -> None:
        """Where the whole is, for the lines of a log file."""
        self.stages = {"": place}

    def _draw(self, stage: str, done: float, total: float, count: str, note: str) -> None:
        if self.bars is None:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            text, rest = TextColumn("{task.description}"), TextColumn("{task.fields[count]:>9}")
            columns = (text, BarColumn(bar_width=28), rest, TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
            self.bars, self.tasks = Bars(*columns, console=err, transient=self.transient), {}
            self.bars.start()
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, start=done > 0, count=count, note=note)
        task = self.tasks[stage]
        if done > 0:
            self.bars.start_task(task)
        self.bars.update(task, completed=done, count=count, note=note)
        if done >= total:
            self.bars.stop_task(task)
        if self.transient and self.bars.finished:
            self.bars.stop()
            self.bars = None

    def _tell(self) -> None:
        while not self.ended.wait(min(1.0, self.every / 4)):
            now = time.monotonic()
            if now - max(self.begin, console.last_line_at) >= self.every:
                running = "; ".join(list(self.stages.values()))
                say(f"... {self.what}, {duration(now - self.begin)}{': ' if running else ''}{running}")


class Waiting(Progress):
    """`with Waiting("loading a model"):` a spinner on a terminal; elsewhere a line where it takes long."""

    def __enter__(self) -> Waiting:
        super().__enter__()
        self.bars = err.status(self.what)
        self.bars.start()  # nothing where stderr is no terminal
        return self
