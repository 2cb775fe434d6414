"""keepsight: memory for what a vision-language model sees."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keepsight import early
from keepsight.errors import (
    AdapterMismatchError,
    BrokenAdapterError,
    KeepsightError,
    KeepsightWarning,
    MergeError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from keepsight import diagnose as diagnose
    from keepsight.checkpoints.load import load
    from keepsight.data.images import open_image
    from keepsight.lab.samples import example_image
    from keepsight.peft_method import memory_off
    from keepsight.pvm import PvmConfig
    from keepsight.vismem import MemoryPolicy, VisMemConfig, add_memory_tokens

__all__ = [
    "AdapterMismatchError",
    "BrokenAdapterError",
    "KeepsightError",
    "KeepsightWarning",
    "MemoryPolicy",
    "MergeError",
    "PvmConfig",
    "UnsupportedModelError",
    "VisMemConfig",
    "add_memory_tokens",
    "example_image",
    "load",
    "memory_off",
    "open_image",
]
__version__ = "0.2.0"

#: Public name -> the module that defines it. It is imported, torch and PEFT with it, when the name is first used.
_DEFINED_IN = {
    "MemoryPolicy": "keepsight.vismem",
    "PvmConfig": "keepsight.pvm",
    "VisMemConfig": "keepsight.vismem",
    "add_memory_tokens": "keepsight.vismem",
    "example_image": "keepsight.lab.samples",
    "load": "keepsight.checkpoints.load",
    "memory_off": "keepsight.peft_method",
    "open_image": "keepsight.data.images",
}


def __getattr__(name: str) -> Any:
    if name == "diagnose":
        return importlib.import_module("keepsight.diagnose")
    if name not in _DEFINED_IN:
        raise AttributeError(f"module 'keepsight' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_DEFINED_IN[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "diagnose"})


def _register() -> None:
    """Make both memories methods of PEFT."""
    for method in ("pvm", "vismem"):
        importlib.import_module(f"keepsight.{method}")


early.after_import(("peft", "keepsight.peft_method"), _register)
