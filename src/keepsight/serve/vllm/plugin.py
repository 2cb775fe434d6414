"""The `vllm.general_plugins` entry point: tells vLLM the architectures that carry a visual memory.

vLLM calls `register` in every one of its processes, whatever model it serves. So it only writes names into a table: the
models' own module, with the check of vLLM's version and internals, is imported when one of them is asked for.
"""

from __future__ import annotations

import logging

from keepsight.serve.vllm.names import SERVED

_FAMILIES = "keepsight.serve.vllm.families"


def register() -> None:
    """Add our architectures to vLLM's registry. Another vLLM than ours is left alone, and told about in its log.

    Serving a keepsight model on another vLLM fails with the reason; serving anything else goes on as if keepsight
    were not installed.
    """
    from keepsight.serve.vllm.check import why_not

    reason = why_not()
    if reason:
        logging.getLogger("vllm.keepsight").warning(
            "%s Models exported by keepsight cannot be served here; all others are unaffected.", reason
        )
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry
    except ImportError:
        if reason:
            return
        raise
    known = ModelRegistry.get_supported_archs()
    for served in SERVED.values():
        for architecture in (served.architecture, served.latent_architecture):
            if architecture in known:
                continue
            ModelRegistry.register_model(architecture, f"{_FAMILIES}:{architecture}")
            if served.base in MODELS_CONFIG_MAP:  # what vLLM adjusts for the base, it shall adjust for ours
                MODELS_CONFIG_MAP[architecture] = MODELS_CONFIG_MAP[served.base]
