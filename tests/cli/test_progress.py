"""A long command is never silent: bars on a terminal, lines in a log file."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from keepsight.cli.common import console, progress
from keepsight.cli.common.progress import Progress, Waiting
from keepsight.words import duration


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=screen, force_terminal=True, width=100))
    return screen


def wait_for(capsys: pytest.CaptureFixture[str], lines: int) -> list[str]:
    found = ""
    deadline = time.monotonic() + 60
    while found.count("\n") < lines and time.monotonic() < deadline:
        time.sleep(0.02)
        found += capsys.readouterr().err
    return found.splitlines()


def test_a_log_file_gets_lines_from_a_stage_that_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("the demo", every=0.1) as show:
        show("PVM", 0.25, 1, "training")
        show("LoRA", 1, 1, "done")
        show("steps", 1200, 3000)
        lines = wait_for(capsys, 2)
    assert all(line.startswith("... the demo, ") for line in lines)
    assert all(line.endswith(" s: PVM training 25%; steps 1,200/3,000") for line in lines)
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # the thread has ended


def test_nothing_is_added_to_what_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", every=3600) as show:
        show("checking samples", 3, 10)
        show.at("step 3/10")
    assert capsys.readouterr().err == ""


def test_a_line_that_was_said_puts_the_next_one_off() -> None:
    console.say("step 1")
    assert time.monotonic() - console.last_line_at < 60


def test_stages_are_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("the diagnosis", announce=True) as show:
        for done in range(3):
            show("curves", done, 2)
        show("causal table", 0, 9)
    assert capsys.readouterr().err.splitlines() == ["curves ...", "causal table ..."]


def test_where_a_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", every=0.1) as show:
        show("checking samples", 16, 16)
        show.at("step 3/10")
        assert wait_for(capsys, 1)[0].endswith(" s: step 3/10")


def test_waiting_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Waiting("loading a/b", every=0.1):
        assert wait_for(capsys, 1)[0].startswith("... loading a/b, ")


def test_a_terminal_gets_bars(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("the demo", every=0.01) as show:
        show("PVM", 0, 1, "waiting")
        show("PVM", 0.25, 1, "training")
        show("samples", 3, 4)
        show("samples", 4, 4)
        time.sleep(0.1)
    assert "25%" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()
    assert capsys.readouterr().err == ""


def test_transient_bars_come_back_for_the_next_stage(terminal: io.StringIO) -> None:
    with Progress("training", transient=True) as show:
        show("checking samples", 2, 2)
        assert show.bars is None
        show("checking samples again", 1, 2)
        assert show.bars is not None


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3.4 s"), (119, "1 min 59 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_command_is_not_silent_before_its_first_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading, checking and importing are no stage, and take long on large data and slow disks."""
    import keepsight.cli

    monkeypatch.setattr(progress, "EVERY", 0.1)
    found: list[str] = []
    monkeypatch.setattr(keepsight.cli, "_load", lambda name: found.extend(wait_for(capsys, 2)))
    with pytest.raises(SystemExit):
        keepsight.cli.LazyGroup(name="keepsight").main(["info", "x"])
    assert [line.startswith("... keepsight info, ") for line in found] == [True, True]
    with keepsight.cli._never_silent(["serve"]) as speaking:
        speaking.end()  # a server that waits for others
        time.sleep(0.4)
    assert capsys.readouterr().err.count("...") == 0
