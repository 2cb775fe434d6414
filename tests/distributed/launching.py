"""How the tests start two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def launch(engine: str, jobs: Path) -> None:
    """Run the worker in two CPU processes, with the shipped config file of an engine."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--config_file"]
    command += [str(RECIPES / f"{engine}.yaml"), str(Path(__file__).parent / "worker.py")]
    alone = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(jobs)], env=os.environ | alone, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
