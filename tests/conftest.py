"""Shared fixtures. Every test runs on tiny random models, one thread, and never talks to a model hub."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from families import FAMILIES, TinyFamily, tiny

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tiny models live: cpu, cuda, cuda:1 (make test-gpu)")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--device {device}: torch finds no GPU here.")
        # float32 means float32: what is compared bit for bit on a CPU is compared closely here
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    tiny.device = device


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    """Every supported family, one after the other."""
    return request.param
