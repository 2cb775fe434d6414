"""Writes the table of README.md from known.txt: python tests_peers/table.py"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- known failures: written by table.py -->\n", "<!-- end -->"


def table() -> str:
    """What is known to fail, by suite."""
    lines, suite = [], ""
    for line in (HERE / "known.txt").read_text().splitlines()[2:]:
        if line.startswith("# "):
            suite = line[2:]
        elif line.strip():
            pattern, _, reason = line.partition(" -- ")
            name = pattern.strip().replace("|", "\\|")
            lines.append(f"| {suite} | `{name}` | {reason.strip()} |")
    return "\n".join(["| suite | tests | why |", "|---|---|---|", *lines]) + "\n"


def filled(page: str) -> str:
    """The page with today's table."""
    return re.sub(f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table() + END, page)


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(filled(page.read_text()))
