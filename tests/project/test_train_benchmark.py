"""The benchmark of training steps runs, compares equals, and weighs what it says. No timing is asserted."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
train = importlib.import_module("train")
stepping = importlib.import_module("training.stepping")


def test_supervised_steps_train_as_many_parameters(tmp_path: Path) -> None:
    file = train.main(
        ["sft", "--quick", "--device", "cpu", "--checkpointing", "--out", str(tmp_path), "--note", "a test"]
    )
    report = json.loads(file.read_text())
    trained = report["settings"]["trained"]
    assert trained.keys() == report["samples_seconds"].keys() == {"pvm", "lora", "mlp"}
    assert max(trained.values()) <= 1.001 * min(trained.values())
    for name, values in report["samples_seconds"].items():
        assert len(values) == report["settings"]["repeats"]
        row = report["summary"][name]
        assert row["peak_bytes"] > 0
        assert row["ms"]["min"] == pytest.approx(1000 * min(values))
    assert set(report["summary"]["lora"]["ratio"].values()) == {1.0}
    assert report["clock"] == "process time"


def test_steps_of_reinforcement_write_equally_many_positions(tmp_path: Path) -> None:
    report = json.loads(train.main(["grpo", "--quick", "--device", "cpu", "--out", str(tmp_path)]).read_text())
    assert report["samples_seconds"].keys() == {"trl", "trl-equal", "vismem-replay", "vismem-score"}
    written = report["settings"]["positions_written_per_trajectory"]
    assert written["trl-equal"] == round(written["vismem-replay"]) > written["trl"]


def test_peak_memory_counts_what_lives_at_once() -> None:
    megabyte = 2**18  # float32 entries
    with stepping.peak_bytes(torch.device("cpu")) as read:
        a = torch.ones(megabyte)
        b = a.view(2, -1)[0]  # looks at the same storage
        c = a * 2
        assert read() == 2 * 2**20
        del a, b, c
        for _ in range(3):
            d = torch.ones(megabyte)
            del d
        assert read() == 2 * 2**20


def committed() -> list[Path]:
    return sorted((FOLDER / "results" / "train").glob("*.json"))


@pytest.mark.parametrize("file", committed(), ids=lambda file: file.stem)
def test_committed_results_are_whole(file: Path) -> None:
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["settings"]["quick"] is False
    assert "/" not in report["conditions"]["command"].replace("benchmarks/", "")
    peaks = {name: row["peak_bytes"] for name, row in report["summary"].items()}
    assert train.summarise(report["samples_seconds"], peaks, report["reference"]) == report["summary"]
