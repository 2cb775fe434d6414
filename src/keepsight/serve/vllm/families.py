"""The architectures: vLLM's own classes with a memory, one per row of `names.SERVED`. Imported by vLLM, on demand."""

from __future__ import annotations

import importlib
from typing import Any

from keepsight.serve.vllm.check import UnsupportedVllmError, check_architecture, check_version
from keepsight.serve.vllm.names import SERVED, ServedFamily

check_version()

from keepsight.serve.vllm.model import WithMemory  # noqa: E402 - not before the version is known
from keepsight.serve.vllm.rows import WithRows  # noqa: E402


def _with(mixin: Any, served: ServedFamily, name: str) -> type:
    try:
        base: Any = getattr(importlib.import_module(served.module), served.class_name or served.base)
    except (ImportError, AttributeError) as error:
        raise UnsupportedVllmError(f"vLLM keeps no {served.name} at {served.module} ({error}).") from error
    check_architecture(base)
    members = {"__module__": __name__, "__doc__": mixin.__doc__, "rename_weights": served.rename}
    return type(name, (mixin, base), members)


def __getattr__(name: str) -> type:
    """Builds the class that vLLM asks for, once; a family whose code moved concerns no other."""
    for served in SERVED.values():
        mixins = {served.architecture: WithMemory, served.latent_architecture: WithRows}
        if name in mixins:
            globals()[name] = made = _with(mixins[name], served, name)
            return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
