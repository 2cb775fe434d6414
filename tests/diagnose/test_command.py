"""`keepsight diagnose` as a user meets it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from processes import interruptible
from typer.testing import CliRunner, Result

from keepsight.cli import app
from keepsight.diagnose import read_results

FILES = {"report.html", "results.json", "decay.svg", "layers.svg", "lens.svg"}


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """The commands silence libraries; other tests should not inherit that."""
    level = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


def diagnose(*words: Any) -> Result:
    return CliRunner().invoke(app, ["diagnose", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


def test_without_arguments_the_reference_vlm_is_diagnosed(tmp_path: Path) -> None:
    """But for fewer samples and tokens, to be quick."""
    out = tmp_path / "out"
    result = diagnose("-o", out, "--samples", 2, "--steps", 160)
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == FILES
    found = read_results(out / "results.json")
    assert found["model"]["name"] == "keepsight/reference"
    assert found["causal"]["verdict"]["word"] == "no memory attached"
    assert found["written"]["decay"]["high"] < 0
    assert "looks less and less at its image" in result.stdout.replace("\n", " ")
    assert "report.html" in result.stderr


def test_a_memory_an_image_and_chosen_layers(trained_folder: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = diagnose(
        trained_folder, "-i", image, "-p", "describe", "-o", out, "--steps", 20, "--every", 4, "--layers", "0,2"
    )
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == FILES | {"causal.svg"}
    found = read_results(out / "results.json")
    assert found["written"]["attention"][0]["layers"] == [0, 2]
    assert found["written"]["attention"][0]["steps"] == [0, 4, 8, 12, 16]
    assert found["causal"]["method"] == "PVM"


def test_dataset_with_a_control(trained_folder: Path, image: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    line = '{"image": "a.png", "prompt": "describe", "reply": "%s", "answer": "a1 3"}'
    data.write_text("\n".join(line % ("the soft line " * n) for n in range(8)))
    out = tmp_path / "out"
    result = diagnose(trained_folder, "-d", data, "-o", out, "--steps", 12, "--control", trained_folder)
    assert result.exit_code == 0, result.output
    found = read_results(out / "results.json")
    assert found["causal"]["samples"] == 8
    assert set(found["lengths"]["quartiles"][0]["accuracy"]) == {"base", "memory", "control"}


def test_latent_memory_on_two_data_sets(vismem_folder: Path, image: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text('{"image": "a.png", "prompt": "describe"}\n' * 2)
    out = tmp_path / "out"
    data = [word for name in ("one", "two") for word in ("-d", tmp_path / f"{name}.jsonl")]
    result = diagnose(vismem_folder, *data, "-o", out, "--steps", 24, "--probe-images", 64, "--samples", 3)
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == FILES | {"causal.svg", "invocations.svg", "latents.svg"}
    found = read_results(out / "results.json")
    assert found["causal"]["method"] == "VisMem"
    counted = found["invocations"]["datasets"]
    assert (counted["one"]["outputs"], counted["two"]["outputs"]) == (2, 1)
    assert {probe["kind"] for probe in found["probes"]} == {"short", "long"}


def test_video_of_frames(image: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(4):
        (frames / f"{number}.png").write_bytes(image.read_bytes())
    result = diagnose("--video", frames, "-p", "describe", "-o", tmp_path / "out", "--steps", 12)
    assert result.exit_code == 0, result.output
    assert "part 2" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "lesson"),
    [
        (["--layers", "some"], "write auto, all, or indices"),
        (["--layers", "9"], "some of 0 to 3"),
        (["-i", "nowhere.png"], "no such image file"),
        (["-d", "x.jsonl", "-p", "what"], "brings its own images"),
        (["--video", "nowhere.gif"], "no such file"),
        (["nowhere/at/all"], "no such folder"),
    ],
)
def test_errors_are_one_lesson(words: list[str], lesson: str, tmp_path: Path) -> None:
    result = diagnose(*words, "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert result.stderr.count("error:") == 1
    assert lesson in result.stderr
    assert not (tmp_path / "out").exists(), "nothing is left of a call that could not be done"


def test_ctrl_c_writes_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "keepsight.cli", "diagnose", "-o", str(out), "--steps", "4000"]
    process = interruptible(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    for line in process.stderr:
        if "writing" in line:
            break
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=180)[1]
    assert process.returncode == 130, errors
    assert "what was measured is in" in errors
    found = read_results(out / "results.json")
    assert found["interrupted"]
    assert len(found["written"]["ids"]) > 10
    assert (out / "report.html").stat().st_size > 10_000
