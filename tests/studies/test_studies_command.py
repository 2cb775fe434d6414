"""`python -m studies run` and `list`: names are checked first, and the report can be made at any time."""

import re

from typer.testing import CliRunner

from studies.__main__ import app
from studies.study import all_studies


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_list_names_every_study(tmp_path):
    listed = call("list", "--results", tmp_path).output
    for name, study in all_studies().items():
        assert name in listed
        assert f"0/{len(study.cells())}" in listed


def test_a_report_without_results_says_that_nothing_was_run(tmp_path):
    page = tmp_path / "page" / "evidence.md"
    places = ("--results", tmp_path / "raw", "-o", page, "--work", tmp_path / "work")
    done = call("run", "pvm-width", "--render", *places)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("not run: ")
    assert "0 of" in page.read_text()
    claims, costs, tables = re.split("## What a memory costs|## Tables", page.read_text())  # costs are the benchmarks'
    assert "holds**" not in claims + tables
    assert "holds**" in costs


def test_wrong_names_and_places_are_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "There are: pvm-length" in str(call("run", "nonsense").exception)
    blocked = call("run", "--render", "--results", tmp_path / "file", "-o", tmp_path / "a.md", "--work", tmp_path)
    assert "is a file" in str(blocked.exception)
    assert (tmp_path / "file").read_text() == "mine"
