"""Gradient checkpointing without work for nothing.

Wherever gradients are checkpointed, transformers, PEFT and TRL make the output of every input embedding require
gradients, the vision encoder's patches included. Only reentrant checkpointing needs that. Otherwise the backward pass
recomputes and runs through every layer below the lowest one that learns, and through the whole frozen vision encoder,
to arrive at gradients that nobody reads: for a PVM on layers 8, 16 and 24 of 36, eight layers and the vision encoder.
"""

from __future__ import annotations

import torch

#: What transformers' and PEFT's hooks on the input embeddings are called.
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")


def stop_below_learners(model: torch.nn.Module) -> int:
    """Take away the hooks that make input embeddings require gradients; not for reentrant checkpointing.

    Switching checkpointing on puts new ones on, so this is called before every forward that has a backward.

    Args:
        model: any model.

    Returns:
        How many hooks were taken away.
    """
    removed = 0
    for module in model.modules():
        found = [key for key, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") in _HOOKS]
        for key in found:
            del module._forward_hooks[key]
        removed += len(found)
    return removed
