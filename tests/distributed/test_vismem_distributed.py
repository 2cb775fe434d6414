"""Two processes train the same latent memory as one, also while nothing is invoked in one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import WEIGHTS, facts, run_jobs, same_gradients, same_weights
from safetensors.torch import load_file
from tiny_training import draw_digit, write_rows
from transformers import AutoModelForImageTextToText, AutoProcessor

MEMORY = {"num_queries": 2, "num_short": 2, "num_long": 3, "query_width": 16, "query_heads": 2}
# Rollouts and forwards hold the same rows on one process as on two, so that only sums are in another order.
SETTINGS = {
    "max_steps": 4,
    "batch_size": 2,
    "group_size": 3,
    "lr": 3e-3,
    "max_new_tokens": 6,
    "max_invocations": 1,
    "save_steps": 2,
    "anywhere_probability": 0.08,
    "delimiter_share": 0.0,
    "rows_per_rollout": 3,
    "rows_per_forward": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def job(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both runs share: questions about digits, one of them without an image; and a base in float64.

    AdamW divides a gradient by its own size: where it is nothing but rounding, so is the whole step, and in float32 two
    orders of the same sum end some 1e-5 apart.
    """
    folder = tmp_path_factory.mktemp("questions")
    rows: list[dict[str, Any]] = []
    for index in range(5):
        draw_digit(index).save(folder / f"{index}.png")
        rows.append({"prompt": "describe", "answer": str(index)} | ({"image": f"{index}.png"} if index else {}))
    data = write_rows(folder / "questions.jsonl", rows)
    base = AutoModelForImageTextToText.from_pretrained(tiny_vlm, dtype=torch.float64)
    base.save_pretrained(folder / "base")
    AutoProcessor.from_pretrained(tiny_vlm).save_pretrained(folder / "base")
    return {"run": "formation", "base": str(folder / "base"), "data": str(data), "vismem": MEMORY, "settings": SETTINGS}


@pytest.fixture(scope="module")
def runs(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Output folders of (one process, two processes under DDP); the second has a resumed run beside it."""
    folder = tmp_path_factory.mktemp("formation")
    single, double = folder / "single", folder / "double"
    run_jobs(single, job | {"output": str(single)})
    resumed = job | {"output": f"{double}-resumed", "resume_from": str(double)}
    run_jobs(double, job | {"output": str(double)}, resumed, engine="ddp")
    return single, double


def test_gradients_and_weights_are_those_of_one_process(runs: tuple[Path, Path]) -> None:
    single, double = runs
    expected = same_gradients(double, single, steps=4, share=1e-10)
    assert sum(float(tensor.abs().max()) > 0 for tensor in expected.values()) > len(expected) / 2
    same_weights(double, single, within=1e-12)


def test_a_process_in_which_nothing_was_invoked_kept_step(runs: tuple[Path, Path]) -> None:
    single, double = runs
    one, two = (facts(double, rank)["invoked"] for rank in (0, 1))
    assert any((a == 0) != (b == 0) for a, b in zip(one, two, strict=True)), (one, two)
    assert [a + b for a, b in zip(one, two, strict=True)] == facts(single)["invoked"]
    assert facts(double)["reward"] == pytest.approx(facts(single)["reward"], abs=1e-12)


def test_a_run_that_was_broken_off_ends_with_the_same_weights(runs: tuple[Path, Path]) -> None:
    _, double = runs
    resumed = Path(f"{double}-resumed")
    assert facts(resumed)["resumed_from"] == 2
    weights, expected = load_file(resumed / WEIGHTS), load_file(double / WEIGHTS)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_folder_is_that_of_one_process(runs: tuple[Path, Path]) -> None:
    single, double = runs
    assert {path.name for path in double.iterdir()} == {path.name for path in single.iterdir()}
    assert (double / "adapter_config.json").read_text() == (single / "adapter_config.json").read_text()
