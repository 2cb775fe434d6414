"""Every measured number of README and docs has a source: a raw result, a date and a command, or a citation."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import figures


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_pages_are_current_and_every_figure_has_a_source(page):
    text = page.read_text()
    assert figures.current(text) == text, "run `make docs-figures`"
    assert list(figures.faults(text)) == [], "see the head of tools/figures.py"


def test_every_function_is_used_by_a_page():
    found = [m.groups() for page in figures.PAGES for m in figures.MARKED.finditer(page.read_text())]
    assert {what.split()[0] for kind, what, _ in found if kind == "figure"} == set(figures.FIGURES)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("PVM reads 97 % here.", "no source"),
        ("It takes 1.26 x the time.", "no source"),
        ("It takes 145 times the time.", "no source"),
        ("It reads .88 of the facts.", "no source"),
        ("Its slope is -0.65 [-0.71, -0.59].", "no source"),
        ("A token takes 4.7 ms.", "no source"),
        ("Reads <!-- told: once, by hand -->97 %<!-- /told -->.", "needs"),
        ("Reads <!-- told: 2026-11-21, `make demo` -->97 %<!-- /figure -->.", "not closed"),
        ("It reads\n<!-- told: 2026-11-21, `make demo` -->97 %<!-- /told -->.", "begins a line"),
    ],
)
def test_a_figure_without_a_source_is_found(text, fault):
    assert any(fault in found for found in figures.faults(text))


@pytest.mark.parametrize(
    "text",
    [
        "Reads <!-- told: 2026-11-21, `make demo` -->97 %<!-- /told -->.",
        "The paper reports <!-- cited: PVM paper, main table -->70.6 %<!-- /cited -->.",
        "Bars are 95 % intervals of 4 x 4 grids; `--share 50 %` is code.\n\n    97 % stands in a command\n",
    ],
)
def test_what_has_a_source_or_needs_none_passes(text):
    assert list(figures.faults(text)) == []


def test_a_page_that_is_out_of_date_is_written_anew():
    page = "PVM reads <!-- figure: lab pvm 2048 -->3 %<!-- /figure --> here.\n"
    new = figures.current(page)
    assert new == page.replace("3 %", figures.compute("lab pvm 2048"))
    assert figures.current(new) == new
    with pytest.raises(ValueError, match="unknown"):
        figures.current(page.replace("lab pvm 2048", "nothing"))
    with pytest.raises(ValueError, match="cannot be computed"):
        figures.current(page.replace("lab pvm 2048", "lab pvm 2049"))
