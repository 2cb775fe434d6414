"""Runs a function in a fresh process that has vLLM imported: a fork of one that has done nothing else.

An engine leaves global state behind (process groups, caches, the choice of kernels), so each gets a process of its own;
an import leaves none, and is most of what a small test would wait for.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every process pins itself to the same core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
IMPORTED = ["vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "keepsight.pvm"]
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(IMPORTED)


def run(function: Callable[..., None], *arguments: str, log: Path, seconds: float = 900) -> str:
    """What it prints, also kept in `log`; a RuntimeError with that if it fails.

    Args:
        function: of an importable module.
        arguments: what it is given.
        log: file to write.
        seconds: after which it is stopped.
    """
    for name, value in ENVIRONMENT.items():  # of the process that is forked: it begins with the first call
        os.environ.setdefault(name, value)
    process = _processes.Process(target=_logged, args=(str(log), function, *arguments))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    said = log.read_text()
    if process.exitcode:
        raise RuntimeError(f"ended with {process.exitcode}: {said[-40000:]}")
    return said


def _logged(log: str, function: Callable[..., None], *arguments: str) -> None:
    with open(log, "w") as stream:
        for output in (1, 2):
            os.dup2(stream.fileno(), output)
    function(*arguments)
