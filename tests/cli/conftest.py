"""Fixtures of the command line's tests."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_training import data, draw_digit, tiny_vlm, trained

__all__ = ["data", "tiny_vlm", "trained"]


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """The commands silence libraries; other tests should not inherit that."""
    level = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    draw_digit(3).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which weights of a base are read."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)
