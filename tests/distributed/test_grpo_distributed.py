"""Two processes refine the same memory and policy by GRPO as one: the same gradients, rewards, weights and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import WEIGHTS, facts, run_jobs, same_gradients, same_weights
from tiny_training import draw_digit, write_rows

import keepsight

# Two prompts per process and step, and more words than images: some process sees none while the other does.
SETTINGS = {
    "max_steps": 2,
    "group_size": 2,
    "batch_size": 2,
    "max_new_tokens": 3,
    "lr": 1e-3,
    "gate_lr_multiplier": 1.0,
    "mask_truncated": False,
    "text_only": "keep",
    "save_steps": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def job(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all runs share: prompts that differ, three of eight with an image."""
    folder = tmp_path_factory.mktemp("prompts")
    rows: list[dict[str, Any]] = []
    for index in range(8):
        draw_digit(index).save(folder / f"{index}.png")
        with_image = {"image": f"{index}.png"} if index % 3 == 0 else {}
        rows.append({"prompt": f"describe {index}", "answer": str(index)} | with_image)
    data = write_rows(folder / "prompts.jsonl", rows)
    return {"run": "grpo", "base": str(tiny_vlm), "data": str(data), "pvm": {"init_gate": 0.5}}


@pytest.fixture(scope="module")
def single(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, eight completions per step."""
    out = tmp_path_factory.mktemp("single") / "out"
    return run_jobs(out, job | {"output": str(out), "settings": SETTINGS | {"grad_accum": 4}})


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def double(request: pytest.FixtureRequest, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes with four completions per step each."""
    out = tmp_path_factory.mktemp(request.param) / request.param
    half = job | {"output": str(out), "settings": SETTINGS | {"grad_accum": 2}}
    return run_jobs(out, half, engine=request.param)


def test_gradients_and_weights_are_those_of_one_process(double: Path, single: Path) -> None:
    expected = same_gradients(double, single, steps=2)
    assert sum(float(tensor.abs().max()) > 0 for tensor in expected.values()) > len(expected) / 2
    for file in (WEIGHTS, f"policy/{WEIGHTS}"):
        same_weights(double, single, file)


def test_a_process_without_an_image_kept_step_with_one_that_had_some(double: Path, single: Path) -> None:
    one, other = (facts(double, rank)["saw_image"] for rank in (0, 1))
    assert len(one) == len(other) > 0
    assert any(a != b for a, b in zip(one, other, strict=True)), (one, other)
    assert facts(double)["sharded"] is double.name.startswith("fsdp")
    assert facts(double)["base_unchanged"] is True
    assert facts(double)["reward"] == pytest.approx(facts(single)["reward"], abs=1e-6)


def test_the_folder_is_that_of_one_process(double: Path, single: Path) -> None:
    def files(out: Path) -> set[str]:
        return {str(path.relative_to(out)) for path in out.rglob("*") if "checkpoint" not in str(path)}

    assert files(double) == files(single)
    assert (double / "adapter_config.json").read_text() == (single / "adapter_config.json").read_text()
    keepsight.load(double)
