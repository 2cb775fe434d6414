"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keepsight.errors import KeepsightError
from keepsight.evaluate.scoring import RULES, Match

ON, OFF = "on", "off"
Compared = Literal["on", "free", "only_short", "only_long", "random", "reversed"]


@dataclass(frozen=True)
class EvalSettings:
    """How a file of questions is asked.

    Attributes:
        memory: what "on" means: "on", or a policy of a VisMem.
        max_new_tokens: the longest answer.
        batch_size: questions at a time.
        strata: into how many groups of about equal size the questions are cut, by the length of their answers (paper
            PVM, section 5: quartiles); answers of one length stay together.
        match: when an answer is right, see `scoring.RULES`.
        seed: of the bootstrap.
    """

    memory: Compared = "on"
    max_new_tokens: int = 1024
    batch_size: int = 8
    strata: int = 4
    match: Match = "answer"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "strata"):
            if getattr(self, name) < 1:
                raise KeepsightError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.match not in RULES:
            raise KeepsightError(f"match={self.match!r}: expected one of {', '.join(RULES)}.")
        if self.memory == OFF:
            raise KeepsightError("memory='off' is asked anyway; say how it is on: 'on', or a policy of a VisMem.")
