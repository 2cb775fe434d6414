"""What all benchmarks share: the conditions of a run, the spread of samples, counting operations."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import keepsight


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, quartiles and largest of some samples."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "q1": lower, "median": median, "q3": upper, "max": max(values)}


class OperationCounter(TorchDispatchMode):
    """Counts the operations that reach the dispatcher and make or change a tensor (views are free)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aliases = [r.alias_info for r in func._schema.returns]
        if not any(a is not None and not a.is_write for a in aliases):
            self.count += 1
        return func(*args, **(kwargs or {}))


def ceilings(device: torch.device, rounds: int = 20) -> dict[str, float]:
    """What this device does at best, measured now: bytes a second of a large copy, operations a second of a matmul.

    A copy reads and writes, so both count. On a GPU: 1 GiB, and 8,192 x 8,192 in bfloat16; on a CPU, smaller.
    """
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    source = torch.empty((1 << 30) if gpu else (1 << 26), dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), 8192 if gpu else 1024
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    made = torch.empty_like(left)

    def seconds(work: Any) -> float:
        work()
        times = []
        for _ in range(rounds):
            if gpu:
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    return {
        "copy_bytes_per_second": 2 * source.numel() / seconds(lambda: target.copy_(source)),
        "matmul_operations_per_second": 2 * side**3 / seconds(lambda: torch.mm(left, right, out=made)),
    }


def conditions(script: str, argv: Sequence[str], measured: Sequence[str], device: torch.device, note: str) -> dict:
    """All that a reader of the numbers must know.

    Args:
        script: path of the benchmark in the repository.
        argv: its arguments.
        measured: the paths whose code is timed; a result whose code was changed since the commit says so.
        device: where the model runs.
        note: what no program can find out.
    """
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else "unknown"

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", script, *argv]),
        "commit": git("rev-parse", "HEAD"),
        "measured_code_changed_since_commit": bool(git("status", "--porcelain", "--", *measured)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "device_type": device.type,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average_at_start": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "transformers": transformers.__version__,
        "keepsight": keepsight.__version__,
        "note": note,
    }


def place(folder: Path, name: str, quick: bool) -> Path:
    """The result file; of a quick run, which nobody may quote, one in a folder that git does not see."""
    folder = folder / "quick" if quick else folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def make_console() -> Console:
    """A console for wide tables."""
    console = Console()
    return console if console.is_terminal else Console(width=180)  # a log file has no edge
