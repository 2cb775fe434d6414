"""The study of many seeds that ships: what its raw results say, of the demo's own recipe, and told in the report."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from keepsight.lab.demo import seeds
from keepsight.lab.demo.methods import DemoSettings

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "lab"))  # as Python does for `python benchmarks/lab/draw_seeds.py`
draw_seeds = importlib.import_module("draw_seeds")
RAW = [json.loads(path.read_text()) for path in sorted(draw_seeds.RESULTS.glob("seed-*.json"))]


def test_what_ships_follows_from_the_raw_results():
    summary = draw_seeds.summarise(draw_seeds.RESULTS)
    assert json.loads((draw_seeds.RESULTS / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert seeds.study() == json.loads(json.dumps(draw_seeds.shipped(summary)))
    for method, entries in seeds.study()["accuracy_by_length"].items():
        assert [run["seed"] for run in RAW if method in run] == seeds.study()["seeds"][method]
        for length, entry in entries.items():
            values = [run[method]["accuracy_by_length"][length]["accuracy"] for run in RAW if method in run]
            assert entry["mean"] == pytest.approx(sum(values) / len(values), abs=1e-4)
            assert (entry["min"], entry["max"], entry["seeds"]) == (min(values), max(values), len(values))


def test_the_study_is_of_the_recipe_that_the_demo_trains():
    plan = json.loads(json.dumps(DemoSettings().plan.as_dict()))
    assert seeds.study()["plan"] == plan
    assert all(run["plan"] == plan and run["split"] == "test" for run in RAW)
    assert len(seeds.study()["seeds"]["pvm"]) >= 10


@pytest.mark.parametrize("shift", ["below", "within", "above"])
def test_a_run_is_placed_among_the_seeds(shift):
    spread = seeds.study()["accuracy_by_length"]["pvm"]["2048"]
    here = {"below": spread["min"] - 0.01, "within": spread["mean"], "above": spread["max"] + 0.001}[shift]
    results = {
        "lengths": [32, 2048, 5000],  # the study has not read at 5,000
        "plan": DemoSettings().plan.as_dict(),
        "pvm": {"accuracy_by_length": {"2048": {"accuracy": here}}},
    }
    compared = seeds.compare(results)
    assert compared["length"] == 2048
    assert compared["same_plan"]
    assert compared["methods"].keys() == {"pvm"}
    assert compared["methods"]["pvm"]["place"] == shift
    words = seeds.in_words(compared)
    for value in (here, spread["mean"], spread["min"], spread["max"]):
        assert f"{value:.1%}" in words
    assert "otherwise" not in words
    quick = seeds.compare({**results, "plan": DemoSettings.quick().plan.as_dict()})
    assert "otherwise" in seeds.in_words(quick)
    assert seeds.compare({**results, "lengths": [33]}) is None
