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


@pytest.fixture(scope="session")
def vismem_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder: a VisMem whose long-term memory had a short warm start; its tokens were never trained."""
    from collections.abc import Iterator

    import numpy as np

    from keepsight.lab.narration import make_narrations
    from keepsight.train.vismem.warm_start import distill
    from studies.vismem.reading import attach_vismem

    model, processor = load_reference()
    model = attach_vismem(model, processor, 0)
    rng = np.random.default_rng(0)

    class Batches:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            while True:
                batch = make_narrations(processor, rng.integers(0, 12, 4).tolist(), 16, "train", rng)
                inputs = batch.model_inputs()
                for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                    inputs[name] = inputs[name][:, :-1]
                yield inputs

    distill(model, Batches(), steps=120, lr=5e-3, kinds=("long",))
    folder = tmp_path_factory.mktemp("trained") / "vismem"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
