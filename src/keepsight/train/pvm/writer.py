"""The interface of engines other than transformers that write GRPO's completions."""

from __future__ import annotations

from typing import Any, Protocol

from keepsight.pvm import PvmConfig
from keepsight.train.run.engines import Engine
from keepsight.train.run.learner import Learner
from keepsight.train.run.settings import GrpoSettings


class Writer(Protocol):
    """Another engine that writes completions, such as `keepsight.serve.vllm.rollouts.VllmRollouts`."""

    def check(self, base: str, pvm: PvmConfig, learner: Learner, settings: GrpoSettings, engine: Engine) -> None:
        """Refuse, before any long work, what cannot be written here."""

    def attach(self, trainer: Any, base: str) -> None:
        """Make this trainer of TRL's take its completions from here. Called once, before the first step."""

    def __str__(self) -> str:
        """In a few words, for the run's log and record."""
