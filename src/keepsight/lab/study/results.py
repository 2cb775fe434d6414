"""Results of a study: numbers by row, column and seed, means with intervals, and verdicts.

Seeds are the units: each has its own base, so two rows are compared seed by seed, and intervals are Student's t over
seeds. With five seeds they are wide, as they should be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Finding = Literal["holds", "does not hold", "cannot be tested here", "not run"]

ENOUGH = 3
"""Seeds without which no verdict is given."""


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its 95 % interval; without limits for fewer than two seeds."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    def points(self) -> str:
        """As a difference in percentage points."""
        if self.n < 2:
            return f"{100 * self.mean:+.1f} points (one seed)"
        return f"{100 * self.mean:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def percent(self) -> str:
        """As a percentage."""
        if self.n < 2:
            return f"{100 * self.mean:.1f} %"
        return f"{100 * self.mean:.1f} % ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval (Student's t) of independent values.

    Raises:
        ValueError: there is none.
    """
    n = len(values)
    if not n:
        raise ValueError("no values, no mean")
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    from scipy import stats  # a second to import; the demo, of one seed, does without

    half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Judgement:
    """A judgement: the word, and the numbers that it rests on in a sentence or two."""

    word: Finding
    because: str


def judged(holds: bool, because: str) -> Judgement:
    """The verdict on a claim that could be tested."""
    return Judgement("holds" if holds else "does not hold", because)


class Results:
    """The finished cells of one study.

    Args:
        cells: row name -> seed -> what the cell's file holds (`values`, `n`, `facts`, ...).
        expected: row name -> seeds that should be there.
    """

    def __init__(self, cells: Mapping[str, Mapping[int, Mapping[str, Any]]], expected: Mapping[str, Sequence[int]]):
        self.cells, self.expected = cells, expected

    @property
    def complete(self) -> bool:
        """Whether every cell was run."""
        return all(set(seeds) <= set(self.cells.get(row, ())) for row, seeds in self.expected.items())

    def seeds(self, row: str, *others: str) -> list[int]:
        """Seeds for which all the given rows are there."""
        return sorted(set.intersection(*(set(self.cells.get(name, ())) for name in (row, *others))))

    def values(self, row: str, column: str) -> dict[int, float]:
        """Values by seed."""
        return {
            seed: cell["values"][column]
            for seed, cell in sorted(self.cells.get(row, {}).items())
            if column in cell["values"]
        }

    def has(self, *rows: str) -> bool:
        """Whether enough seeds are there for all these rows together: three, or all that are wanted if that is less."""
        return len(self.seeds(*rows)) >= min(ENOUGH, *(len(self.expected[row]) for row in rows))

    def at(self, row: str, column: str) -> Interval:
        """The mean over seeds."""
        return interval(list(self.values(row, column).values()))

    def difference(self, row: str, other: str, column: str, other_column: str | None = None) -> Interval:
        """Mean over seeds of `row` minus `other`, paired by seed."""
        mine, theirs = self.values(row, column), self.values(other, other_column or column)
        return interval([mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())])

    def best(self, rows: Sequence[str], column: str) -> str:
        """The row with the highest mean."""
        return max(rows, key=lambda row: self.at(row, column).mean)

    def fact(self, row: str, key: str) -> dict[int, Any]:
        """A fact by seed."""
        return {
            seed: cell["facts"][key] for seed, cell in sorted(self.cells.get(row, {}).items()) if key in cell["facts"]
        }
