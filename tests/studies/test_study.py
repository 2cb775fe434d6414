"""Studies: the registry is sound, runs resume after a kill, and the report says what the results say."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from toy_studies import FAILING, TOY

from keepsight.lab.study.results import interval
from keepsight.lab.study.runs import as_json, cell_file, cells_to_run, read_results, run_cells
from keepsight.lab.study.study import StudyError
from studies.evidence import render
from studies.pvm.studies import CHOSEN, TRIES, TUNING
from studies.study import all_studies, choose

ROOT = Path(__file__).parent.parent.parent
RAW = ROOT / "studies" / "results"


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", all_studies())
def test_every_study_can_be_run_and_reported(name):
    studies = all_studies()
    study = studies[name]
    rows = [row.name for row in study.rows]
    assert len(set(rows)) == len(rows)
    assert len({column.key for column in study.columns}) == len(study.columns)
    for row in study.rows:
        if row.same_as is not None:
            source = studies[row.same_as[0]]
            assert source.row(row.same_as[1]).same_as is None
            assert {c.key for c in study.columns} & {c.key for c in source.columns}
    for claim in study.claims:
        assert set(claim.rows) <= set(rows)
        assert claim.rows
    if study.plot is not None:
        assert set(study.plot.rows) <= set(rows)
        assert set(study.plot.columns) <= {column.key for column in study.columns}
    for row, seed in study.cells():
        pickle.dumps((study.cell, as_json(study.settings_of(row)), seed))


def test_no_two_cells_of_a_study_are_the_same_work():
    for study in all_studies().values():
        settings = [
            json.dumps(as_json(study.settings_of(row)), sort_keys=True) for row in study.rows if not row.same_as
        ]
        assert len(set(settings)) == len(settings), study.name


def test_studies_are_chosen_by_the_beginning_of_their_names():
    assert {study.name for study in choose(["pvm-l", "continual"])} == {"pvm-length", "pvm-layers", "continual"}
    with pytest.raises(StudyError, match="pvm-length"):
        choose(["nonsense"])


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_are_students_t(n):
    from scipy import stats

    values = [math.sin(3.0 * i) for i in range(n)]
    low, high = stats.t.interval(0.95, n - 1, sum(values) / n, stats.sem(values))
    found = interval(values)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)


def test_differences_are_paired_by_seed(tmp_path):
    run_cells(cells_to_run([_harmless()], tmp_path / "results", tmp_path))
    results = read_results(TOY, tmp_path / "results", {"toy": TOY})
    gap = results.difference("high", "low", "1")
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.25, 0.25, 0.25))  # the seeds' own spread cancels
    assert results.at("high", "1").half > 0.01
    assert results.values("again", "1") == results.values("high", "1")


def _harmless():
    """The toy, but nobody gets killed."""
    return dataclasses.replace(TOY, cell=_without_killing)


def _without_killing(bench, settings, seed):
    return TOY.cell(bench, {**settings, "deadly": False}, seed)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from toy_studies import TOY\n"
        "from keepsight.lab.study.runs import cells_to_run, run_cells\n"
        "run_cells(cells_to_run([TOY], Path(sys.argv[2]) / 'results', Path(sys.argv[2])))"
    )
    call = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(call).returncode == -9
    kept = cell_file(tmp_path / "results", "toy", "low", 0)
    before = kept.read_text()
    assert len(cells_to_run([TOY], tmp_path / "results", tmp_path)) == 7
    run_cells(cells_to_run([TOY], tmp_path / "results", tmp_path))
    assert read_results(TOY, tmp_path / "results", {"toy": TOY}).complete
    assert kept.read_text() == before
    assert not list((tmp_path / "results").rglob("*.part"))
    assert cells_to_run([TOY], tmp_path / "results", tmp_path) == []
    assert len(cells_to_run([TOY], tmp_path / "results", tmp_path, again=True, seeds=2)) == 4


def test_a_worker_that_dies_ends_the_run_and_nothing_finished_is_lost(tmp_path):
    with pytest.raises(StudyError, match="toy / high"):
        run_cells(cells_to_run([TOY], tmp_path / "results", tmp_path, seeds=1), workers=2)
    run_cells(cells_to_run([TOY], tmp_path / "results", tmp_path))
    results = read_results(TOY, tmp_path / "results", {"toy": TOY})
    assert results.complete
    made_by = {cell["facts"]["made_by"] for cells in results.cells.values() for cell in cells.values()}
    assert len(made_by) == 1  # what cells share was made once


def test_cells_of_other_settings_count_as_missing(tmp_path):
    study = _harmless()
    run_cells(cells_to_run([study], tmp_path, tmp_path, seeds=1))
    changed = dataclasses.replace(study, settings={"new": 1})
    assert len(cells_to_run([changed], tmp_path, tmp_path, seeds=1)) == 2
    assert not read_results(changed, tmp_path, {"toy": changed}).cells
    cell_file(tmp_path, "toy", "low", 0).write_text("{")
    with pytest.raises(StudyError, match="Delete it"):
        cells_to_run([study], tmp_path, tmp_path)


def test_one_failing_cell_does_not_stop_the_others(tmp_path):
    said = {}
    run_cells(cells_to_run([FAILING], tmp_path, tmp_path), on_done=lambda cell, result: said.update({cell.row: result}))
    assert "this cell always fails" in str(said["bad"])
    assert said["good"]["values"]["1"] == 0.1
    assert [cell.row for cell in cells_to_run([FAILING], tmp_path, tmp_path)] == ["bad"]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_run_and_what_not(tmp_path):
    page, studies = tmp_path / "docs" / "evidence.md", {"toy": TOY}
    words = [entry.verdict.word for entry in render(studies, tmp_path / "results", page, "raw")]
    assert words == ["not run", "not run"]
    assert "not run" in page.read_text()
    assert not list(page.parent.rglob("*.png"))
    run_cells(cells_to_run([_harmless()], tmp_path / "results", tmp_path, seeds=2))
    words = [entry.verdict.word for entry in render(studies, tmp_path / "results", page, "raw")]
    assert words == ["not run", "not run"]
    tables = page.parent / "evidence" / "toy.md"
    assert "2 seeds are too few to judge" in tables.read_text()
    run_cells(cells_to_run([_harmless()], tmp_path / "results", tmp_path, seeds=3))
    words = [entry.verdict.word for entry in render(studies, tmp_path / "results", page, "raw")]
    text = tables.read_text()
    assert words == ["holds", "does not hold"]
    assert "high minus low: +25.0 points [+25.0, +25.0] (3 of 4 seeds.)" in text
    assert "(3 of 4 seeds)" in text
    assert r"| high \| with a bar" in text
    assert "| 51.0 ± 2.5 | 1.50 ± 0.00 |" in text
    assert "6 of 8 cells" in page.read_text()
    assert "[**holds**](evidence/toy.md)" in page.read_text()
    assert (page.parent / "images" / "evidence-toy.png").stat().st_size > 1000
    run_cells(cells_to_run([_harmless()], tmp_path / "results", tmp_path))
    render(studies, tmp_path / "results", page, "raw")
    assert "of 4 seeds" not in tables.read_text()


def test_learning_rates_are_the_winners_of_the_tuning():
    results = read_results(TUNING, RAW, all_studies())
    assert results.complete
    for method, (_, rates) in TRIES.items():
        means = {lr: results.at(f"{method}-{lr:g}", "mean").mean for lr in rates}
        assert means[CHOSEN[method]] == max(means.values()), method
        assert len(rates) >= 4
        assert min(rates) < CHOSEN[method] < max(rates), f"{method}: the best stands at an end of what was tried"


def test_committed_results_belong_to_the_studies_as_they_are(tmp_path):
    studies = all_studies()
    of_the_eye = set((RAW / "eye").rglob("*.json"))  # which has a gate, and is no study
    for file in sorted(set(RAW.rglob("*.json")) - of_the_eye):
        record = json.loads(file.read_text())
        study = studies[record["study"]]
        assert file == cell_file(RAW, record["study"], record["row"], record["seed"])
        assert record["settings"] == as_json(study.settings_of(study.row(record["row"]))), file.name
        assert {column.key for column in study.columns} & set(record["values"]), file.name


def test_the_committed_pages_are_made_from_the_committed_results(tmp_path):
    render(all_studies(), RAW, tmp_path / "docs" / "evidence.md", "../studies/results")
    made = sorted(tmp_path.rglob("*.md"))
    committed = [ROOT / page.relative_to(tmp_path) for page in made]
    assert [page.read_text() for page in made] == [page.read_text() for page in committed]
    assert set((ROOT / "docs" / "evidence").glob("*.md")) == set(committed) - {ROOT / "docs" / "evidence.md"}
