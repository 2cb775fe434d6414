"""Fixtures of VisMem's training."""

from __future__ import annotations

from pathlib import Path

import pytest
from vismem_questions import (
    SIZES,
    digits,
    formation,
    make_questions,
)

from keepsight.train.vismem.train import (
    VisMemReport,
    train_vismem_formation,
)
from keepsight.vismem import VisMemConfig


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_questions(tmp_path_factory.mktemp("questions") / "data")


@pytest.fixture(scope="module")
def formed(tiny_vlm: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisMemReport]:
    """A stage-I adapter; not to be changed."""
    out = tmp_path_factory.mktemp("formed") / "one"
    report = train_vismem_formation(
        tiny_vlm,
        questions,
        out,
        vismem=VisMemConfig(**SIZES),
        rewards=[digits],
        settings=formation(warm_start_steps=2),
        text_only="keep",
    )
    return out, report
