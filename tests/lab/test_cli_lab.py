"""`keepsight lab pretrain`: what is wrong is found before the work, and nothing of the user's is replaced."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepsight.cli.lab import lab_app
from keepsight.lab import pretraining
from keepsight.lab.pretraining import PRETRAINING_RECORD, PretrainConfig


@pytest.fixture
def few_steps(monkeypatch):
    """The real command and the real pretraining, with hardly any steps."""

    def config(seed=0, **more):
        return PretrainConfig(seed=seed, align_steps=1, dense_steps=1, short_steps=1)

    monkeypatch.setattr(pretraining, "PretrainConfig", config)


def call(*words):
    return CliRunner().invoke(lab_app, ["pretrain", *map(str, words)])


def test_it_writes_a_base_and_says_how_well_it_reads(few_steps, tmp_path):
    done = call("--output-dir", tmp_path / "base", "--seed", 5, "--max-jump", 0)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "base" / PRETRAINING_RECORD).read_text())
    assert record["config"]["seed"] == 5
    assert record["config"]["max_jump"] == 0
    assert f"{record['short_accuracy']:.1%}" in done.output
    again = call("--output-dir", tmp_path / "base")
    assert "--overwrite" in str(again.exception)
    assert json.loads((tmp_path / "base" / PRETRAINING_RECORD).read_text()) == record
    assert call("--output-dir", tmp_path / "base", "--overwrite", "--seed", 6).exit_code == 0
    assert json.loads((tmp_path / "base" / PRETRAINING_RECORD).read_text())["config"]["seed"] == 6


def test_foreign_folders_and_files_are_left_alone(few_steps, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for words in ((), ("--overwrite",)):
        assert "holds no base made here" in str(call("--output-dir", tmp_path / "mine", *words).exception)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert "is a file" in str(call("--output-dir", tmp_path / "mine" / "thesis.txt").exception)


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def stop(out: Path, *_):
        (out / "half").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "pretrain", stop)
    stopped = call("--output-dir", tmp_path / "base")
    assert "nothing was written" in str(stopped.exception)
    assert list(tmp_path.iterdir()) == []
