"""`model.generate(...)` of a model that carries VisMem: what it takes, refuses and returns."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.peft_method import memory_off
from keepsight.vismem import scope
from keepsight.vismem.branch import VisMemBranch
from keepsight.vismem.writing.checks import refuse, warn, with_stop_strings
from keepsight.vismem.writing.decoding import MemoryDecoder
from keepsight.vismem.writing.output import VisMemOutput
from keepsight.vismem.writing.policy import NO_MEMORY, MemoryPolicy
from keepsight.vismem.writing.splicing import Invocations, invocations_of, splice_values
from keepsight.vismem.writing.writer import MemoryWriter


def generate(
    branch: VisMemBranch,
    *args: Any,
    memory: MemoryPolicy | str | None = None,
    invocations: Invocations | VisMemOutput | None = None,
    rollout: Any = None,
    **kwargs: Any,
) -> Any:
    """`generate` of a model that carries VisMem.

    Args:
        branch: the model's `VisMemBranch`.
        args: as for transformers' `generate`.
        memory: when memory is invoked: a `MemoryPolicy`, or its name. Default: the config's policy.
        invocations: the memories that stand in `input_ids`, per row: `out.invocations` of the output that they come
            from (or the output itself), where an earlier answer is part of the prompt (a conversation). They are read
            as they were written, with "off", too, which then means that no further one is invoked.
        rollout: `RolloutOptions`, for training and experiments.
        kwargs: as for transformers' `generate`. Memory positions count towards `max_new_tokens`.

    Returns:
        As transformers' `generate`; with `return_dict_in_generate=True`, a `VisMemOutput`.

    Raises:
        KeepsightError: before any work, for what cannot be combined with memory.
    """
    model = branch.backbone.model
    plain = type(model).generate
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    invocations = None if invocations is None else invocations_of(invocations)
    has_history = isinstance(ids, torch.Tensor) and bool(branch.tokens.memory_mask(ids).any())
    if invocations is not None and any(invocations) and not has_history:
        raise KeepsightError("invocations were given, and input_ids hold no memory: give the sequences they stand in.")
    if branch.active is None:
        if has_history:
            raise KeepsightError(
                "input_ids hold memories, and no VisMem adapter is active to read them. Switch it on, or leave the "
                "memories out: ids[~branch.tokens.memory_mask(ids)]."
            )
        if memory is not None:
            warnings.warn(
                f"memory={memory!r} has no effect: no VisMem adapter is active.", KeepsightWarning, stacklevel=2
            )
        return plain(model, *args, **kwargs)
    policy = MemoryPolicy.of(memory, branch.config)
    if policy.name == "off":
        if not has_history:
            with memory_off(branch):
                return plain(model, *args, **kwargs)
        policy = NO_MEMORY
    refuse(model, args, kwargs)
    warn(branch, policy)
    if policy.name == "random" and not branch.config.delimiter_ids:
        raise KeepsightError(
            "Policy 'random' invokes after delimiters, whose tokens are unknown: call "
            "add_memory_tokens(processor, model)."
        )
    kwargs = with_stop_strings(model, kwargs, branch.tokens)
    history = None
    if has_history:
        assert ids is not None
        mask = branch.tokens.latent_mask(ids)
        if invocations is None and bool(mask.any()):
            raise KeepsightError(
                f"input_ids hold {int(mask.sum())} latents of earlier memories, which ids alone do not carry. "
                "Give them: model.generate(..., invocations=out.invocations); or leave the memories out: "
                "ids[~branch.tokens.memory_mask(ids)]."
            )
        history = invocations or [[] for _ in ids]
        splice_values(mask, history, 0)  # raises if they do not fit
    writer = MemoryWriter(branch, policy)
    decoder = MemoryDecoder(writer, kwargs, history) if rollout is None else rollout.decoder(writer, kwargs, history)
    with scope.watching() as watch:
        decoder.watch = watch
        output = plain(model, *args, custom_generate=decoder.run, **kwargs)
    if not decoder.has_run:
        raise KeepsightError(
            "transformers' generate went another way than the loop that it was given (custom_generate), so no memory "
            "was formed. Leave out what asks for that way, or generate without memory (memory='off')."
        )
    for text in decoder.notes():
        warnings.warn(text, KeepsightWarning, stacklevel=2)
    return output
