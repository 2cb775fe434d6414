"""keepsight: memory for what a vision-language model sees."""

from typing import Any

from keepsight import early  # noqa: F401  (first)
from keepsight.checkpoints.load import load
from keepsight.errors import (
    AdapterMismatchError,
    BrokenAdapterError,
    KeepsightError,
    KeepsightWarning,
    MergeError,
    UnsupportedModelError,
)
from keepsight.pvm import PvmConfig
from keepsight.vismem import VisMemConfig

__all__ = [
    "AdapterMismatchError",
    "BrokenAdapterError",
    "KeepsightError",
    "KeepsightWarning",
    "MergeError",
    "PvmConfig",
    "UnsupportedModelError",
    "VisMemConfig",
    "load",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`keepsight.diagnose` without an import of its own; it is read when first used."""
    if name == "diagnose":
        import importlib

        return importlib.import_module("keepsight.diagnose")
    raise AttributeError(f"module 'keepsight' has no attribute {name!r}")
