"""Tiny random models of every supported family: a row each, in a file for the families of one kind."""

from __future__ import annotations

import transformers
from packaging.version import Version

from families import gemma, llava, others, patches, pictures, qwen
from families.first import FAMILIES
from families.tiny import (
    END,
    EOS,
    FIRST_WORD,
    IMAGE,
    LAST_WORD,
    PAD,
    START,
    VIDEO,
    VOCAB,
    Row,
    TinyFamily,
    count_visual_tokens,
    make_inputs,
)

__all__ = [
    "BY_NAME",
    "END",
    "EOS",
    "FAMILIES",
    "FIRST_WORD",
    "IMAGE",
    "LAST_WORD",
    "MORE",
    "PAD",
    "ROWS",
    "START",
    "VIDEO",
    "VOCAB",
    "Row",
    "TinyFamily",
    "count_visual_tokens",
    "make_inputs",
]

#: Those that go through everything.
BY_NAME = {family.name: family for family in FAMILIES}
#: The others, which go through the essential tests (tests/pvm/test_more_families.py).
ROWS = [*qwen.ROWS, *gemma.ROWS, *llava.ROWS, *pictures.ROWS, *patches.ROWS, *others.ROWS]
#: Those of them that this release of transformers has: the oldest supported ones lack the newest families.
MORE = [
    tiny
    for tiny in ROWS
    if hasattr(transformers, tiny.model_class) and Version(transformers.__version__) >= Version(tiny.since)
]
