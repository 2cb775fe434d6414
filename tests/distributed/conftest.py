"""Fixtures of training over several processes."""

import sys
from pathlib import Path

from tiny_training import data, tiny_vlm

sys.path.insert(0, str(Path(__file__).parent))

__all__ = ["data", "tiny_vlm"]
