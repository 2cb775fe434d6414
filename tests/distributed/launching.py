"""What the tests of several processes share: running jobs in one or two of them, and comparing what came out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny import device
from safetensors.torch import load_file
from worker import main

WEIGHTS = "adapter_model.safetensors"
ON_GPUS = torch.device(device).type == "cuda"
"""Two processes run on two GPUs (`make test-gpu`), in float32 without TF32; the one they are compared with on a CPU."""
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def launch(engine: str, jobs: Path) -> None:
    """Run the worker in two processes, with the shipped config file of an engine."""
    if ON_GPUS and torch.cuda.device_count() < 2:
        pytest.skip("two processes on GPUs need two")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
    command += [str(RECIPES / f"{engine}.yaml"), str(Path(__file__).parent / "worker.py")]
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    if not ON_GPUS:
        alone |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, str(jobs)], env=os.environ | alone, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]


def run_jobs(out: Path, *jobs: dict[str, Any], engine: str | None = None) -> Path:
    """Run jobs, the first of which writes to `out`: in two processes under an engine, or in this one. Returns `out`."""
    if engine is not None and ON_GPUS:
        jobs = tuple(job | {"settings": job["settings"] | {"device": "cuda", "bf16": False}} for job in jobs)
    file = out.with_suffix(".jobs")
    file.write_text(json.dumps(jobs))
    if engine is None:
        main(str(file))
    else:
        launch(engine, file)
    return out


def facts(out: Path, rank: int = 0) -> dict[str, Any]:
    """What one process of a run noted down."""
    return json.loads(Path(f"{out}-rank{rank}.json").read_text())


def same_gradients(double: Path, single: Path, steps: int, share: float = 3e-5) -> dict[str, torch.Tensor]:
    """Assert that two processes saw the gradients of one, in so many steps; returns the gradients of the one.

    They may differ by `share` of a tensor's largest.
    """
    gradients, expected = (load_file(f"{out}-gradients.safetensors") for out in (double, single))
    assert gradients.keys() == expected.keys()
    assert {name.partition(".")[0] for name in expected} == {str(step) for step in range(steps)}
    for name, tensor in expected.items():
        bound = (1e-3 if ON_GPUS else share) * float(tensor.abs().max())  # there, another device's kernels
        torch.testing.assert_close(gradients[name], tensor, rtol=0, atol=bound, msg=name)
    return expected


def same_weights(double: Path, single: Path, file: str = WEIGHTS, within: float = 1e-6) -> None:
    """Assert that two processes ended with the weights of one."""
    weights, expected = load_file(double / file), load_file(single / file)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-4 if ON_GPUS else within, msg=name)
