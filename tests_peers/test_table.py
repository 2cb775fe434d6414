"""The table of README.md is that of known.txt."""

from pathlib import Path

import table


def test_the_table_is_current() -> None:
    page = Path(__file__).with_name("README.md").read_text()
    assert table.filled(page) == page, "run python tests_peers/table.py"
