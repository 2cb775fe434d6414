"""transformers' modelling tester (its own file) on models that carry a memory."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Iterator
from typing import Any

import models
import upstream

upstream.prepare()

from generation import GenerationTests  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402

PARENTS = (ModelTesterMixin, GenerationTests, unittest.TestCase)


def _case(name: str, memory: str) -> type:
    """The tester for one family with one memory."""

    @contextlib.contextmanager
    def whole(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A part of a test that fails is the test failing, which known.txt can name."""
        yield

    def set_up(self: Any) -> None:
        self.model_tester = models.TinyTester(name)

    members: dict[str, Any] = {
        "all_model_classes": (models.model_class(name, memory),),
        "_is_composite": True,
        "setUp": set_up,
        "subTest": whole,
        "__module__": __name__,
    }
    return type(f"Test_{name}_{memory}", PARENTS, members)


for _name in models.FAMILIES:
    for _memory in models.MEMORIES:
        _made = _case(_name, _memory)
        globals()[_made.__name__] = _made
del globals()["ModelTesterMixin"], globals()["GenerationTests"], _made  # pytest would collect them
