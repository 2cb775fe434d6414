"""Runs of `keepsight train pvm`: killed and resumed, refused before any work, and what a failing one keeps."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import QUICK, make_data, read_rows, write_rows

import keepsight
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.pvm.sft import SftSettings, TrainingDivergedError, TrainReport, train_pvm
from keepsight.train.run.output import OutputError, check_output, check_space, last_checkpoint

WEIGHTS = "adapter_model.safetensors"


def settings(**changes: Any) -> SftSettings:
    return SftSettings(**(QUICK | changes))


def same_weights(a: Path, b: Path) -> bool:
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_resumes_to_the_same_weights(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    # Eight steps make an epoch, so that the run ends in the middle of one.
    options = {"max_steps": 36, "save_steps": 10, "batch_size": 2, "blindfold_steps": 15}
    unbroken = train_pvm(tiny_vlm, data, tmp_path / "unbroken", settings=settings(**options))

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "keepsight.cli", "train", "pvm", str(tiny_vlm), "-d", str(data), "-o", str(out)]
    flags = {"max-steps": 36, "save-steps": 10, "batch-size": 2, "grad-accum": 1, "lr": 3e-3, "blindfold-steps": 15}
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while last_checkpoint(out)[0] is None and time.monotonic() < deadline:  # the first whole checkpoint
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()

    (out / ".saving-x").mkdir()  # what a kill leaves while the result is saved
    said: list[str] = []
    report = train_pvm(tiny_vlm, data, out, settings=settings(**options), resume=True, say=said.append)
    assert not (out / ".saving-x").exists()
    assert "keepsight.load" in (out / "README.md").read_text()
    assert report.resumed_from is not None
    assert report.resumed_from >= 10
    assert any(line.startswith("resuming from") for line in said)
    assert same_weights(tmp_path / "unbroken", out)
    assert (report.tokens, report.gates) == (unbroken.tokens, unbroken.gates)

    # Resuming a finished run changes nothing.
    before = (out / WEIGHTS).read_bytes()
    assert train_pvm(tiny_vlm, data, out, settings=settings(**options), resume=True).steps == 36
    assert (out / WEIGHTS).read_bytes() == before


def test_broken_checkpoints_are_passed_over(trained: tuple[Path, TrainReport], tiny_vlm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    newest = out / "checkpoint-12"
    assert last_checkpoint(out) == (newest, [])

    weights = (newest / WEIGHTS).read_bytes()
    (newest / WEIGHTS).write_bytes(weights[:-1000])
    found, broken = last_checkpoint(out)
    assert found == out / "checkpoint-6"
    assert "not a whole safetensors file" in broken[0]

    (newest / WEIGHTS).write_bytes(weights)
    (newest / "trainer_state.json").unlink()
    assert last_checkpoint(out)[1] == ["checkpoint-12: saving it was interrupted"]

    tensors = load_file(out / "checkpoint-6" / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, out / "checkpoint-6" / WEIGHTS)
    found, broken = last_checkpoint(out)
    assert found is None
    assert "NaN or infinite" in broken[1]


def test_a_folder_can_be_watched_while_a_run_starts_in_it(tmp_path: Path) -> None:
    out = tmp_path / "new"
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(lambda: [check_output(out) for _ in range(300)])
        while not starting.done():
            assert last_checkpoint(out) == (None, [])
        starting.result()


def test_resuming_under_other_settings_is_refused(
    trained: tuple[Path, TrainReport], tiny_vlm: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    source = make_data(tmp_path / "data")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"other settings: width was 96, now 32; .*lr was 0.003, now 0.001"):
        train_pvm(tiny_vlm, source, out, pvm=keepsight.PvmConfig(width=32), settings=settings(lr=1e-3), resume=True)
    # Data in another folder are the same data; as many other samples are not.
    rows = read_rows(source)
    write_rows(source, [*rows[:3], rows[4], rows[3], *rows[5:]])
    with pytest.raises(OutputError, match=r"other settings: digest of the data was \w+, now \w+\. "):
        train_pvm(tiny_vlm, source, out, settings=settings(), resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_full_folder_is_not_written_into(trained: tuple[Path, TrainReport], tiny_vlm: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    source = make_data(tmp_path / "data")
    with pytest.raises(OutputError, match="is not empty"):
        train_pvm(tiny_vlm, source, out, settings=settings())
    said: list[str] = []
    train_pvm(tiny_vlm, source, out, settings=settings(max_steps=1), overwrite=True, say=said.append)
    assert (tmp_path / "out.old" / WEIGHTS).read_bytes() == (trained[0] / WEIGHTS).read_bytes()
    assert any("out.old" in line for line in said)
    assert not (out / "checkpoint-12").exists()


def test_a_run_that_saved_nothing_is_no_obstacle(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        """Ctrl-C at the second step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(), callbacks=[Stop()])
    assert train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=1)).steps == 1


def test_a_failing_run_leaves_its_checkpoints(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Vanish(TrainerCallback):
        """Takes the images away after the first checkpoint."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for image in data.parent.glob("*.png"):
                image.unlink()

    out = tmp_path / "out"
    with pytest.raises(KeepsightError, match="no such image file"):
        train_pvm(tiny_vlm, data, out, settings=settings(save_steps=2), callbacks=[Vanish()])
    found, broken = last_checkpoint(out)
    assert found == out / "checkpoint-2"
    assert broken == []
    keepsight.load(found)


def test_a_diverging_run_stops_and_keeps_what_was_good(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        """Makes one weight infinite after the first checkpoint."""

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))

    out = tmp_path / "out"
    with pytest.raises(TrainingDivergedError, match="at step 3"):
        train_pvm(tiny_vlm, data, out, settings=settings(save_steps=2), callbacks=[Poison()])
    assert last_checkpoint(out)[0] == out / "checkpoint-2"
    assert not (out / WEIGHTS).exists()


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"lr": -1.0}, {"warmup_ratio": 1.5}, {"max_steps": 0}, {"workers": -1}]
)
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|negative"):
        SftSettings(**wrong)


def test_a_setting_without_effect_warns() -> None:
    with pytest.warns(KeepsightWarning, match="no effect without max_length"):
        SftSettings(over_long="skip")


def test_the_output_folder_is_checked_first(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        train_pvm(tiny_vlm, data, tmp_path / "file", settings=settings())
    with pytest.raises(OutputError, match="cannot be written"):
        train_pvm(tiny_vlm, data, "/proc/keepsight", settings=settings())
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="no training run that --resume could go on with"):
        train_pvm(tiny_vlm, data, data.parent, settings=settings(), resume=True)
    with pytest.raises(OutputError, match="MB are free, and the run needs about"):
        check_space(tmp_path, 2**60, "the run")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_named() -> None:
    import errno

    from keepsight.cli.common.console import explain

    with pytest.raises(OSError, match="No space left") as error:
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert error.value.errno == errno.ENOSPC
    assert "the disk is full" in explain(error.value)
    with pytest.raises(RuntimeError) as torchs:
        torch.save(torch.ones(100_000), "/dev/full")
    assert "the disk is full" in explain(torchs.value)


def test_training_an_adapter_is_refused(trained: tuple[Path, TrainReport], data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeepsightError, match="is an adapter"):
        train_pvm(trained[0], data, tmp_path / "out", settings=settings())
