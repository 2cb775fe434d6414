"""The reference VLM and a memory trained on it, short and quick, shared by all tests of the diagnosis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepsight.lab.experiments import TrainPlan, train
from keepsight.lab.reference import load_reference


@pytest.fixture(scope="session")
def reference() -> tuple[Any, Any]:
    """(the shipped base, its processor)."""
    return load_reference()


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder: a PVM trained for about a quarter of the demo's steps."""
    model, processor = load_reference()
    result = train(model, processor, "pvm", TrainPlan(warmup_steps=80, steps=10, max_gap=8), seed=0)
    folder = tmp_path_factory.mktemp("trained") / "pvm"
    result.model.save_pretrained(folder)
    return folder


@pytest.fixture
def with_memory(trained_folder: Path) -> tuple[Any, Any]:
    """(the base with the trained memory, its processor)."""
    import keepsight

    return keepsight.load(trained_folder, device="cpu")
