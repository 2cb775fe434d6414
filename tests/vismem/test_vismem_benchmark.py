"""The benchmark runs, and what stands in its results follows from the samples."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def vismem_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("vismem", None)
    import vismem

    yield vismem
    sys.modules.pop("vismem", None)


def test_quick_run(vismem_benchmark, capsys, tmp_path):
    vismem_benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("literal") == 2


def test_committed_summaries_follow_from_their_samples(vismem_benchmark):
    files = list((BENCHMARKS / "results" / "vismem").glob("*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text())
        assert not found["conditions"]["measured_code_changed_since_commit"]
        for row in found["results"]:
            assert row["seconds"] == pytest.approx(vismem_benchmark.spread([s["seconds"] for s in row["samples"]]))
            assert all(len(s["formations"]) == row["invocations"] for s in row["samples"])
