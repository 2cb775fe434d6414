"""A reward for `keepsight train vismem-...` on the eye: the thing is named, in whatever words."""

from __future__ import annotations

from typing import Any

from keepsight.diagnose.battery.lengths import contains
from keepsight.train.rewards.rewards import text_of


def names(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the answer's thing is named: its words without "A" or "An" and without the full stop.

    Beside `match` it pays for what was seen before the form is right, which a memory that was just begun breaks.
    """
    things = [one.rstrip(".").split(" ", 1)[-1] for one in answer]
    return [float(contains(text_of(one), thing)) for one, thing in zip(completions, things, strict=True)]
