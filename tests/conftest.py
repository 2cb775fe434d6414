"""Shared fixtures. Every test runs on tiny random models, one thread, and never talks to a model hub."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from families import FAMILIES, TinyFamily

torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    """Every supported family, one after the other."""
    return request.param
