"""GRPO with completions by vLLM: what vLLM writes is what the trainer's own model would, after every step."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import pytest
import rollouts

DIFFERENCE = "sampling/sampling_logp_difference/mean"


def run(folder: Path, family: str, policy: str, lr: float, handed: bool = True, packed: bool = False) -> list[float]:
    """By step: how far vLLM's log-probabilities lie from the trainer's."""
    job = {"family": family, "policy": policy, "lr": lr, "handed": handed, "packed": packed}
    (folder / "job.json").write_text(json.dumps(job))
    fresh.run(rollouts.main, str(folder / "job.json"), str(folder / "logs.json"), log=folder / "log")
    found = [logs[DIFFERENCE] for logs in json.loads((folder / "logs.json").read_text()) if DIFFERENCE in logs]
    assert len(found) == 3
    return found


# full: the memory and the language model; lora: a LoRA merged into copies; none: the memory alone
@pytest.mark.parametrize(
    ("family", "policy", "lr"),
    [
        ("qwen2_5_vl", "none", 1e-2),
        ("qwen2_5_vl", "lora", 1e-2),
        ("qwen2_5_vl", "full", 1e-3),
        ("qwen3_vl", "full", 1e-3),
        ("internvl", "full", 1e-3),
        ("llava_onevision", "full", 1e-3),
    ],
)
def test_vllm_writes_with_the_weights_of_every_step(tmp_path: Path, family: str, policy: str, lr: float) -> None:
    found = run(tmp_path, family, policy, lr)
    assert max(found) < 0.02  # what forbidding the placeholders changes; without the new weights it is above 1, below


def test_without_the_new_weights_vllm_is_found_to_be_another_model(tmp_path: Path) -> None:
    first, *later = run(tmp_path, "qwen2_5_vl", "none", 1e-2, handed=False)
    assert first < 0.02
    assert min(later) > 1


def test_packed_weights_of_a_cpu_build_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="packs the language model's weights"):
        run(tmp_path, "qwen2_5_vl", "lora", 1e-2, packed=True)
