"""keepsight: memory for what a vision-language model sees."""

from keepsight.errors import (
    AdapterMismatchError,
    BrokenAdapterError,
    KeepsightError,
    KeepsightWarning,
    MergeError,
    UnsupportedModelError,
)
from keepsight.loading import load
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
