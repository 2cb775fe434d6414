"""What is refused, warned of, or prepared before a generation with memory begins."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import StoppingCriteriaList, StopStringCriteria
from transformers.generation import GenerationMode

from keepsight.compat import find_cache
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.vismem.sequences import TextOnly
from keepsight.vismem.tokens import LONG, SHORT, MemoryTokens
from keepsight.vismem.writing.policy import MemoryPolicy

_ANOTHER_LOOP = (
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "prefill_chunk_size",
    "custom_generate",
    "token_healing",
)
_OWN_LOOP = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def refuse(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise for what memory cannot be combined with."""

    def option(name: str) -> Any:
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        for source in (given, model.generation_config):
            if name in kwargs:
                return kwargs[name]
            if source is not None and getattr(source, name, None) is not None:
                return getattr(source, name)
        return None

    instead = "Generate without memory (memory='off'), or without that option."
    if (option("num_beams") or 1) > 1:
        raise KeepsightError(f"num_beams={option('num_beams')}: beams cannot be combined with memory. {instead}")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if option(name) not in (None, False):
            raise KeepsightError(f"{name}: assisted decoding cannot be combined with memory. {instead}")
    for name in _ANOTHER_LOOP:
        if option(name):
            raise KeepsightError(f"{name}={option(name)!r} cannot be combined with memory. {instead}")
    if kwargs.get("cache_implementation") == "paged":
        raise KeepsightError(
            "cache_implementation='paged' means continuous batching, which takes no images and has a loop of its own. "
            + instead
        )
    if option("guidance_scale") not in (None, 1):
        raise KeepsightError(
            f"guidance_scale={option('guidance_scale')}: the pass without the prompt reads one token at each step, "
            f"and the steps of a memory have none. {instead}"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if option(name):
            raise KeepsightError(f"{name}=True is not collected while memory is invoked. {instead}")
    if option("use_cache") is False:
        raise KeepsightError("use_cache=False: memory needs the KV cache; leave use_cache out.")
    if kwargs.get("inputs_embeds") is not None:
        raise KeepsightError("inputs_embeds: memory needs input_ids, to know which positions are visual.")
    cache = find_cache((), kwargs)
    if cache is not None and int(cache.get_seq_length()):
        raise KeepsightError(
            "The KV cache that was given already holds a prompt, whose visual states memory can no longer read. Pass "
            "the whole conversation as input_ids with its images, and its memories as invocations=out.invocations."
        )


def refuse_mode(generation_config: Any) -> None:
    """Raise if `generate` would have gone another way than by sampling: whatever asked for it is not done by us."""
    mode = generation_config.get_generation_mode()
    if mode not in _OWN_LOOP:
        raise KeepsightError(
            f"These options of generate ask for {mode.value.replace('_', ' ')}, which cannot be combined with memory. "
            "Generate without memory (memory='off'), or greedily or by sampling."
        )


def warn(branch: Any, policy: MemoryPolicy) -> None:
    """Warn of memories and invocation tokens that were never trained."""
    if not policy.can_invoke:
        return
    memory = branch.active
    untrained = [kind for kind, bank in ((SHORT, memory.short_bank), (LONG, memory.long_bank)) if bank.is_untrained]
    if len(untrained) == 2:
        warnings.warn(
            "This VisMem was never trained: its memories are noise, and the text after them is worse for it. Train it, "
            "load a trained adapter, or generate with memory='off'.",
            KeepsightWarning,
            stacklevel=3,
        )
    if policy.model_decides and memory.rows.is_untrained:
        warnings.warn(
            f"Policy {policy.name!r} lets the model decide when to invoke memory, but its invocation tokens were never "
            "trained, so it invokes them by chance. Use memory=MemoryPolicy('forced', at={...}) or 'random' until "
            "stage II has trained them.",
            KeepsightWarning,
            stacklevel=3,
        )


def with_stop_strings(model: Any, kwargs: dict[str, Any], tokens: MemoryTokens) -> dict[str, Any]:
    """Stop strings as a criterion of our own: transformers drops the tokenizer on the way to a custom loop."""
    kwargs = dict(kwargs)
    given = kwargs.get("generation_config")
    strings = kwargs.pop("stop_strings", None) or getattr(given or model.generation_config, "stop_strings", None)
    tokenizer = kwargs.pop("tokenizer", None)
    if not strings:
        return kwargs
    if tokenizer is None:
        raise KeepsightError("stop_strings needs the tokenizer: generate(..., tokenizer=processor.tokenizer).")
    kwargs["stop_strings"] = None
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    criterion = TextOnly(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings), tokens, pad)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
    return kwargs
