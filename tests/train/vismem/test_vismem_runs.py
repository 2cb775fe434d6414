"""Runs of VisMem's stages: killed and resumed, diverging, of the command line, and dry ones."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import read_rows, write_rows
from vismem_questions import (
    SIZES,
    WEIGHTS,
    digits,
    formation,
    invocation,
    same,
)

import keepsight
from keepsight.errors import KeepsightError
from keepsight.train.run.controls import Control
from keepsight.train.run.output import OutputError, last_checkpoint
from keepsight.train.run.trainer import TrainingDivergedError
from keepsight.train.vismem.train import (
    VisMemReport,
    train_vismem_formation,
    train_vismem_invocation,
)
from keepsight.vismem import VisMemBranch, VisMemConfig


def run_stage(stage: str, source: Path, data: Path, out: Path, max_steps: int = 4, **more: Any) -> VisMemReport:
    options = {"max_steps": max_steps, "save_steps": 1}
    common: dict[str, Any] = {"rewards": ["vismem_questions:digits"], "text_only": "keep", **more}
    if stage == "formation":
        config = VisMemConfig(**SIZES)
        return train_vismem_formation(source, data, out, vismem=config, settings=formation(**options), **common)
    return train_vismem_invocation(source, data, out, settings=invocation(**options), **common)


@pytest.mark.parametrize("stage", ["formation", "invocation"])
def test_a_killed_run_resumes_to_the_same_weights(
    stage: str, formed: tuple[Path, VisMemReport], tiny_vlm: Path, questions: Path, tmp_path: Path
) -> None:
    train = partial(run_stage, stage, tiny_vlm if stage == "formation" else formed[0])
    unbroken = train(questions, tmp_path / "unbroken")
    out = tmp_path / "killed"
    # spawned, not forked: torch's threads do not outlive a fork
    run = multiprocessing.get_context("spawn").Process(target=train, args=(questions, out))
    run.start()
    deadline = time.monotonic() + 120
    while last_checkpoint(out)[0] is None and time.monotonic() < deadline and run.is_alive():
        time.sleep(0.002)
    os.kill(run.pid or 0, signal.SIGKILL)
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()

    said: list[str] = []
    report = train(questions, out, resume=True, say=said.append)
    assert report.resumed_from is not None
    assert report.resumed_from >= 1
    assert same(tmp_path / "unbroken", out)
    assert (report.tokens_generated, report.last["reward"]) == (unbroken.tokens_generated, unbroken.last["reward"])
    first, second = (
        [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "unbroken", out)
    )
    assert first == second
    # Under other settings it is another run.
    with pytest.raises(OutputError, match="max_steps was 4, now 9"):
        train(questions, out, max_steps=9, resume=True)
    others = write_rows(
        questions.parent / f"{stage}.jsonl", [{**row, "answer": "never"} for row in read_rows(questions)]
    )
    with pytest.raises(OutputError, match="digest of the data"):
        train(others, out, resume=True)


def test_a_checkpoint_of_before_the_one_engine_is_read(formed: tuple[Path, VisMemReport], tmp_path: Path) -> None:
    """Its logs stood in the run's folder alone."""
    from keepsight.train.vismem.accounts import METRICS, STATE, VisMemState

    now = VisMemState.read(formed[0] / "checkpoint-2")
    names = ("kl_coefficient", "tokens_generated", "tokens_trained")
    old = {"step": now.global_step, "seconds": 1.0, "first": {}, "last": {}} | {n: getattr(now, n) for n in names}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / STATE).write_text(json.dumps({"global_step": now.global_step, "progress": old}))
    (tmp_path / METRICS).write_text((formed[0] / METRICS).read_text() + '{"step": 5, "lo')
    read = VisMemState.read(tmp_path / "checkpoint-2")
    assert len(read.log_history) == read.global_step == 2
    assert all(getattr(read, name) == getattr(now, name) for name in ("log_history", *names))


def test_a_diverging_run_stops_and_keeps_what_was_good(
    tiny_vlm: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keepsight.train.vismem.stages import FormationStage

    original, calls = FormationStage.log_probs, [0]

    def poisoned(self: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        return original(self, *args) * (float("nan") if calls[0] > 4 else 1.0)

    monkeypatch.setattr(FormationStage, "log_probs", poisoned)
    out = tmp_path / "out"
    with pytest.raises(TrainingDivergedError, match="in step"):
        train_vismem_formation(
            tiny_vlm,
            questions,
            out,
            vismem=VisMemConfig(**SIZES),
            rewards=[digits],
            settings=formation(max_steps=30, save_steps=1, rows_per_forward=9),
            text_only="keep",
        )
    assert last_checkpoint(out)[0] is not None
    assert not (out / WEIGHTS).exists()


def run_command(*words: str) -> Any:
    from typer.testing import CliRunner

    from keepsight.cli import app

    return CliRunner().invoke(app, ["train", *words])


def test_the_commands_train_both_stages_beside_controls(
    tiny_vlm: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_stages.py").write_text(
        "def digits(completions, answer, **columns):\n"
        "    return [sum(w.isdigit() for w in text.split()) / 9 for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(questions), "--text-only", "keep", "--reward", "rewards_of_stages:digits", "--device", "cpu"]
    flags += ["--max-steps", "1", "--batch-size", "2", "--group-size", "2", "--max-new-tokens", "4", "--lr", "1e-3"]
    flags += ["--max-invocations", "2", "--eval-dataset", str(questions)]
    sizes = ["--num-short", "2", "--num-long", "3", "--num-queries", "2", "--delimiter-probability", "1"]
    one = run_command("vismem-formation", str(tiny_vlm), "-o", "one", *flags, *sizes, "--control", "lora,sft=1e-4,none")
    assert one.exit_code == 0, one.output
    assert "no bit changed" in one.stdout
    told = json.loads((tmp_path / "one" / "comparison.json").read_text())["outcomes"]
    assert [outcome["name"] for outcome in told] == ["vismem", "lora", "sft", "none"]
    memory, lora, sft, none = told
    model, _ = keepsight.load(tmp_path / "one")
    size = sum(p.numel() for p in VisMemBranch.of(model).active.parameters())
    assert 0.9 * size < lora["parameters"] <= size
    assert sft["parameters"] > size
    assert sft["lr"] == 1e-4
    assert {outcome["steps"] for outcome in told[:3]} == {1}
    assert all("eval_reward" in outcome["metrics"] for outcome in told)
    assert none["metrics"]["eval_reward"] == memory["metrics"]["eval_reward_without_memory"]
    # The control is an ordinary adapter of the base, without a memory.
    beside, _ = keepsight.load(tmp_path / "one" / "control-lora")
    assert "LORA" in str(beside.peft_config["default"].peft_type)
    keepsight.load(tmp_path / "one" / "control-sft")

    # Stage II's controls go on from stage I's, here from a LoRA that no other run has; the base stays the base.
    before = load_file(tmp_path / "one" / "control-lora" / WEIGHTS)
    save_file(
        {n: t + 0.5 if ".lora_B." in n else t for n, t in before.items()}, tmp_path / "one/control-lora" / WEIGHTS
    )
    beside_two = ["--train", "lora", "--control", "lora,sft,none"]
    two = run_command("vismem-invocation", "one", "-o", "two", *flags, "--start-bias", "2", *beside_two)
    assert two.exit_code == 0, two.output
    assert "p_type" in two.stderr
    after = load_file(tmp_path / "two" / "control-lora" / WEIGHTS)
    assert after.keys() == before.keys()
    assert all((after[n] - t - 0.5).abs().max() < 0.01 for n, t in before.items() if ".lora_B." in n)
    assert any(not torch.equal(after[n], t + 0.5) for n, t in before.items() if ".lora_B." in n)
    assert "control sft in two/control-sft, from one/control-sft" in two.stderr
    told = {one["name"]: one for one in json.loads((tmp_path / "two" / "comparison.json").read_text())["outcomes"]}
    assert told["none"]["metrics"]["eval_reward"] == none["metrics"]["eval_reward"]
    assert told["lora"]["parameters"] == lora["parameters"]
    again = run_command("vismem-invocation", "one", "-o", "two", *flags, "--start-bias", "2")
    assert again.exit_code != 0
    assert "not empty" in str(again.output) + str(again.exception)


def test_a_control_that_vismem_has_not_is_refused(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(KeepsightError, match="Take lora"):
        train_vismem_formation(
            tiny_vlm, questions, tmp_path / "out", rewards=[digits], settings=formation(), controls=[Control("mlp")]
        )


def test_a_dry_run_reads_no_weights(tiny_vlm: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keepsight.train.vismem.dry_run import dry_run_vismem

    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: pytest.fail("weights were read"))
    small = dry_run_vismem(tiny_vlm, formation(), VisMemConfig(**SIZES), length=64)
    large = dry_run_vismem(tiny_vlm, formation(rows_per_forward=8), VisMemConfig(**SIZES), length=64)
    assert large.need.activations_plain > 1.5 * small.need.activations_plain
    assert small.need.activations_checkpointed < small.need.activations_plain
    assert small.traced.flops > 0
    tokens = dry_run_vismem(tiny_vlm, invocation(), VisMemConfig(**SIZES), length=64)
    assert tokens.trained == 4 * 96 + 2  # tied head: four rows and two biases
    result = run_command("vismem-formation", str(tiny_vlm), "--dry-run", "--data", str(questions))
    assert result.exit_code == 0, result.output
    assert "16 of them visual" in result.stdout


def test_a_dry_run_of_an_adapter_measures_the_data(formed: tuple[Path, VisMemReport], questions: Path) -> None:
    result = run_command("vismem-invocation", str(formed[0]), "--dry-run", "--data", str(questions))
    assert result.exit_code == 0, result.output
    assert "16 of them visual" in result.stdout


def test_a_dry_runs_count_is_the_runs(formed: tuple[Path, VisMemReport], tiny_vlm: Path) -> None:
    from keepsight.train.vismem.dry_run import dry_run_vismem

    assert dry_run_vismem(tiny_vlm, formation(), VisMemConfig(**SIZES)).trained == formed[1].trainable
