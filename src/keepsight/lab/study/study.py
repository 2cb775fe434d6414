"""The parts of a study: rows to compare, seeds to repeat them with, claims to judge by the results.

A *study* is data plus one function. The function runs one *cell* (one row with one seed) and returns numbers; the
runner (`keepsight.lab.study.runs`) writes one small JSON per finished cell, and reports are made from those files
alone: the demo's page (`keepsight.lab.demo`), and the evidence on the papers' claims, which stands in the repository
beside the package (`studies/`). To write one::

    def cell(bench: Bench, settings: dict, seed: int) -> Measured: ...

    Study(name="mine", cell=cell, rows=(TableRow("base", "base"), TableRow("mine", "mine", {"lr": 1e-3})), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from keepsight.checkpoints.atomic import new_folder
from keepsight.errors import KeepsightError
from keepsight.lab.study.results import Judgement, Results

SEEDS = (0, 1, 2, 3, 4)
"""Of the studies: each seed has its own base, its own initial weights and data, its own test images."""


class StudyError(KeepsightError):
    """A study that does not exist, or results that cannot be used."""


@dataclass(frozen=True)
class Measured:
    """What one cell found.

    Attributes:
        values: what was measured, by column: accuracies as shares of one, counts as they are.
        n: answers behind each accuracy.
        facts: anything else worth keeping (parameters, gates, layers chosen, seconds of training), ready for JSON.
    """

    values: Mapping[str, float]
    n: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Where a cell works.

    Attributes:
        work: folder for what can be made again, such as pretrained bases; shared by all cells.
        report: called as `report(what is being done, share done)`.
    """

    work: Path
    report: Callable[[str, float], None] = lambda what, share: None

    def keep(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `work / name`, made by `make(folder)` if it is not there yet.

        It appears whole or not at all, and two processes never make the same one.
        """
        from filelock import FileLock

        folder = self.work / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with new_folder(folder) as fresh:
                    make(fresh)
        return folder


Cell = Callable[[Bench, dict[str, Any], int], Measured]
"""Called as `cell(bench, {**study.settings, **row.settings}, seed)`. A function of a module, so that any process can
run it; the same arguments must give the same numbers."""


@dataclass(frozen=True)
class TableRow:
    """One line of a study's table.

    Attributes:
        name: for files and code; letters, digits, `-`, `_`.
        label: for readers.
        settings: what distinguishes it, ready for JSON.
        same_as: `(study, row)` that runs exactly this; its results are shown and nothing is run twice.
        seeds: fewer or other seeds than the study's.
    """

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    same_as: tuple[str, str] | None = None
    seeds: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Column:
    """One column of a study's table: `key` of `Measured.values`, its heading, and whether it is a share of one."""

    key: str
    label: str
    percent: bool = True


@dataclass(frozen=True)
class Claim:
    """A claim and how it is judged.

    Attributes:
        text: what is claimed, with the claimant's numbers.
        source: where it stands, such as "PVM paper, table 1"; "ours" for our own questions.
        rows: rows that it rests on; until three seeds have all of them, or all that are wanted, it is "not run".
        judge: looks at the study's results.
        name: for code that looks for this claim.
    """

    text: str
    source: str
    rows: tuple[str, ...]
    judge: Callable[[Results], Judgement]
    name: str = ""


@dataclass(frozen=True)
class Plot:
    """How a study is drawn: "lines" over numeric columns, or "bars" of one column by row."""

    kind: Literal["lines", "bars"]
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    x_label: str = "generated tokens before the answer"
    mark: float | None = None


@dataclass(frozen=True)
class Study:
    """One question to the lab.

    Attributes:
        name: for the command line and folders, such as "pvm-length".
        method: whose question it is: "PVM", "VisMem" or "both".
        title: heading in the report.
        setting: how it is asked here, in a paragraph of markdown.
        cell: runs one row with one seed.
        rows, columns: of the table.
        claims: judged from the results.
        settings: shared by all rows, ready for JSON.
        seeds: each row is repeated with these.
        minutes: measured CPU minutes of all its cells, for planning.
        plot: how it is drawn, if it is.
    """

    name: str
    method: Literal["PVM", "VisMem", "both"]
    title: str
    setting: str
    cell: Cell
    rows: tuple[TableRow, ...]
    columns: tuple[Column, ...]
    claims: tuple[Claim, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    minutes: float | None = None
    plot: Plot | None = None

    def row(self, name: str) -> TableRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def settings_of(self, row: TableRow) -> dict[str, Any]:
        """All that the numbers of a row depend on, besides the seed."""
        return {**self.settings, **row.settings}

    def cells(self) -> list[tuple[TableRow, int]]:
        """What is to be run: seeds outside, so that an interrupted run has whole rows of few seeds."""
        own = [row for row in self.rows if row.same_as is None]
        seeds = sorted({seed for row in own for seed in (row.seeds or self.seeds)})
        return [(row, seed) for seed in seeds for row in own if seed in (row.seeds or self.seeds)]
