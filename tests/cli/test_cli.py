"""The command line as a user meets it: its help, its errors of usage, and real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import Trained, keepsight_cli, message, spoiled
from processes import interruptible

import keepsight
from keepsight.cli import COMMANDS
from keepsight.installed import install_line
from keepsight.train.run.output import last_checkpoint


def test_help_teaches() -> None:
    for words in ([], ["--help"], ["-h"]):
        result = keepsight_cli(*words)
        assert result.exit_code == 0
        assert "keepsight demo --quick" in result.stdout
        for name, (_, _, line, _) in COMMANDS.items():
            assert name in result.stdout
            assert line in result.stdout


@pytest.mark.parametrize("words", [["generate"], ["info"], ["train", "pvm"]])
def test_every_command_has_examples(words: list[str]) -> None:
    result = keepsight_cli(*words, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"keepsight {' '.join(words)}" in result.stdout


def test_version() -> None:
    assert keepsight_cli("--version").stdout == f"keepsight {keepsight.__version__}\n"


@pytest.mark.parametrize(
    ("words", "lesson"),
    [
        (["generate", "--imgae", "x"], "No such option"),
        (["generate"], "Missing option '--prompt'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["generate", "-p", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["train", "pvm", "x"], "Missing option"),
    ],
)
def test_usage_errors_point_to_the_help(words: list[str], lesson: str) -> None:
    result = keepsight_cli(*words)
    assert result.exit_code == 2
    assert lesson in result.stderr
    assert "How to use it: keepsight" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    result = keepsight_cli("train", "pvm", "x", "-d", "y", "-o", "z")
    assert install_line("train") in message(result)


def test_a_missing_library_of_another_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "demo", ("needs_the_lab", "demo", "", "Start"))
    monkeypatch.setitem(sys.modules, "sklearn", None)

    class Finder:
        """Stands for a command whose file imports scikit-learn."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name != "needs_the_lab":
                return None
            import importlib.util

            return importlib.util.spec_from_loader(name, Loader())

    class Loader:
        @staticmethod
        def create_module(spec: Any) -> None:
            return None

        @staticmethod
        def exec_module(module: Any) -> None:
            import sklearn  # noqa: F401

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert install_line("lab") in message(keepsight_cli("demo"))


def run(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keepsight.cli", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def said(stderr: str) -> list[str]:
    """The lines of a process, without those that tell on a slow machine that it still runs."""
    return [line for line in stderr.strip().splitlines() if not line.startswith("... ")]


def test_a_process_that_fails(trained: Trained, image: Path, tmp_path: Path) -> None:
    broken = spoiled(trained[0], tmp_path, "truncated")
    result = run("generate", broken, "-i", image, "-p", "x")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(said(result.stderr)) == 1
    assert said(result.stderr)[0].startswith("error: ")
    debug = run("generate", broken, "-i", image, "-p", "x", "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_a_process_that_answers(trained: Trained, image: Path) -> None:
    result = run("generate", trained[0], "-i", image, "-p", "describe", "--max-new-tokens", 4)
    assert result.returncode == 0
    assert len(result.stdout.split()) == 4
    assert len(said(result.stderr)) == 1  # libraries are silent; ours is the line with the timing


def test_ctrl_c_ends_training_with_one_line(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", "pvm", tiny_vlm, "-d", data, "-o", out, "--max-steps", 100000, "--save-steps", 5]
    command = [sys.executable, "-m", "keepsight.cli", *(str(word) for word in words), "--keep-checkpoints", "2"]
    process = interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while last_checkpoint(out)[0] is None and time.monotonic() < deadline:  # whole: a file that exists may be empty yet
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    *before, last = said(stderr)
    assert last.startswith("interrupted: stopped by Ctrl-C.")
    assert "--resume" in last
    assert not [line for line in before if "interrupt" in line.lower() or "Traceback" in line]


@pytest.mark.parametrize(("device", "lesson"), [("gpu7", "not a device"), ("meta", "nothing can be computed there")])
def test_a_device_that_is_none_is_refused_before_anything_loads(device: str, lesson: str) -> None:
    result = keepsight_cli("generate", "--device", device, "--prompt", "read")
    assert lesson in message(result)
