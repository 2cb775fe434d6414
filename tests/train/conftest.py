"""Fixtures of training and the command line."""

import sys
from pathlib import Path

from tiny_training import data, tiny_vlm, trained

__all__ = ["data", "tiny_vlm", "trained"]

sys.path.insert(0, str(Path(__file__).parents[1] / "vismem"))  # VisMem's training shares VisMem's tiny models
