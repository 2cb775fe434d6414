"""A reward for `keepsight train vismem-...` on the eye: the thing is named, in whatever words."""

from __future__ import annotations

import re
from typing import Any


def names(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the answer's thing is named: its words without "A" or "An" and without the full stop.

    Beside `match` it pays for what was seen before the form is right, which a memory that was just begun breaks.
    """
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    things = [one.rstrip(".").split(" ", 1)[-1] for one in answer]
    return [
        float(bool(re.search(rf"\b{re.escape(thing)}\b", text, re.IGNORECASE)))
        for text, thing in zip(texts, things, strict=True)
    ]
