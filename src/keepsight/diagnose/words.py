"""Counts in good English."""

from __future__ import annotations


def counted(n: float, one: str, many: str | None = None) -> str:
    """ "1 output", "2 outputs", "1,024 memories"."""
    return f"{n:,.0f} {one if n == 1 else many or one + 's'}"


def listed(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
