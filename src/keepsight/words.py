"""Counts and lists in good English."""

from __future__ import annotations

from collections.abc import Iterable


def counted(n: float, one: str, many: str | None = None) -> str:
    """ "1 output", "2 outputs", "1,024 memories"."""
    return f"{n:,.0f} {one if n == 1 else many or one + 's'}"


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def some(names: Iterable[object], limit: int = 4) -> str:
    """A few of the names."""
    found = [str(name) for name in names]
    return ", ".join(found[:limit]) + (", ..." if len(found) > limit else "")


def duration(seconds: float) -> str:
    """Seconds in words a reader grasps: 42.0 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
