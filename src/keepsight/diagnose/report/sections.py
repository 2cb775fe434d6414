"""Elements of a page as data: tables, charts, sections. `parts.html` says how they look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keepsight.diagnose.statistics import Estimate


@dataclass(frozen=True)
class TableCell:
    """A value, and in small print its interval."""

    text: str
    small: str = ""

    @classmethod
    def of(cls, value: Any) -> TableCell:
        """A value; of an estimate also its interval."""
        if value is None:
            return cls("-")
        if isinstance(value, Estimate):
            if value.n < 2:
                return cls(f"{value.value:.3f}", "one sample, no interval")
            return cls(f"{value.value:.3f}", f"{value.low:.3f} to {value.high:.3f}")
        return cls(str(value))


@dataclass(frozen=True)
class NamedRow:
    """A line of a table: its name, in small print what it is, and its cells; `kind` is a class of the style sheet."""

    name: str
    what: str
    cells: Sequence[TableCell]
    kind: str = ""


@dataclass(frozen=True)
class ReportTable:
    """Headings, the first of them for the names, and rows."""

    titles: Sequence[str]
    rows: Sequence[NamedRow]

    @classmethod
    def of(cls, titles: Sequence[str], rows: Sequence[tuple[str, str, Sequence[Any]]]) -> ReportTable:
        """From (name, what it is, values) of each row."""
        return cls(titles, [NamedRow(name, what, [TableCell.of(v) for v in values]) for name, what, values in rows])


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        title: above it.
        svg: the drawing.
        legend: what has a `name`, a `colour` and may be `dashed`.
        note: below it.
        beside: what must be read together with it.
    """

    title: str
    svg: Markup
    legend: Sequence[Any] = ()
    note: str = ""
    beside: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A heading with notes, a list, charts and a table, in this order; `folded` is the line that opens the table."""

    title: str = ""
    notes: Sequence[str] = ()
    items: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    table: ReportTable | None = None
    folded: str = ""
    level: int = 2
