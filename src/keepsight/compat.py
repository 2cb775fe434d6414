"""All that differs between the supported releases of transformers and PEFT, and nothing else.

transformers 5.24 calls the KV cache `cache` where earlier releases call it `past_key_values`: in the arguments of every
call, and among the fields of every output. So a cache is found by what it is, an instance of transformers' `Cache`, and
is given under the name by which the callee's own signature asks for one. `gradient_checkpointing` is on its way to
become `activation_checkpointing`. What a processor takes stands in its signature, or in a type of
its `text_kwargs`.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import PushToHubMixin

from keepsight.errors import KeepsightError, KeepsightWarning

#: What `generate` returns, with the name of the cache as this release writes it: base of our own generation outputs.
GenerationOutput = GenerateDecoderOnlyOutput


def find_cache(args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Cache | None:
    """The KV cache among the arguments of a call, whatever its name and position.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.

    Returns:
        The cache; None if the call carries none.

    Raises:
        KeepsightError: if there are two.
    """
    found: Cache | None = None
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, Cache) and value is not found:
            if found is not None:
                raise KeepsightError(
                    f"Found two KV caches in one call ({type(found).__name__} and {type(value).__name__}); expected "
                    "one. Give the cache once, under one name."
                )
            found = value
    return found


def find_output_cache(output: Any) -> Cache | None:
    """The KV cache in what a model, a decoder or `generate` returned: a `ModelOutput`, or a tuple; None without one."""
    if isinstance(output, Mapping):
        return find_cache(output.values())
    return find_cache(output) if isinstance(output, tuple) else None


def has_paged_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a call is a step of continuous batching, whose cache is no `Cache`, and which knows ids only, no images.

    Args:
        arguments: those of a model's call, by name.
    """
    return any(isinstance(value, PagedAttentionCache) for value in arguments.values())


def cache_argument(callee: Any, cache: Cache | None) -> dict[str, Cache]:
    """The keyword argument that gives a cache to a call, e.g. `model(input_ids=ids, **cache_argument(model, cache))`.

    Args:
        callee: a model or one of its modules, with or without adapters, or the class of an output.
        cache: the KV cache, or None.

    Returns:
        The cache under the name of the parameter of `callee` whose type is a cache; where none is declared (a wrapper
        that passes everything on, as PEFT's), under the name that this release gives it. Nothing for None.
    """
    if cache is None:
        return {}
    return {_cache_parameter(_signed(callee)) or _cache_parameter(GenerationOutput) or _no_name(): cache}


def _signed(callee: Any) -> Callable[..., Any]:
    """Whose signature tells the name: a class's own, or its `forward`."""
    return callee if inspect.isclass(callee) else type(callee).forward


@functools.cache
def _cache_parameter(callee: Callable[..., Any]) -> str | None:
    parameters = inspect.signature(callee).parameters.values()
    names = [p.name for p in parameters if re.search(r"\bCache\b", str(p.annotation))]
    return names[0] if names else None


def _no_name() -> str:
    raise KeepsightError(
        f"transformers {metadata.version('transformers')} declares no KV cache in its GenerateDecoderOnlyOutput, where "
        "keepsight reads its name. Install a release that keepsight was tested with (see docs/compatibility.md)."
    )


def checkpointing_arguments(config_class: type, enabled: bool) -> dict[str, Any]:
    """The arguments of a `TrainingArguments` class that switch checkpointing, not reentrant, on or off."""
    name = "activation" if "activation_checkpointing" in inspect.signature(config_class).parameters else "gradient"
    options = {"use_reentrant": False} if enabled else None
    return {f"{name}_checkpointing": enabled, f"{name}_checkpointing_kwargs": options}


def checkpoints_reentrantly(arguments: Any) -> bool:
    """Whether training under these `TrainingArguments` checkpoints reentrantly, by either name."""
    options = (getattr(arguments, f"{name}_checkpointing_kwargs", None) for name in ("activation", "gradient"))
    return any(given.get("use_reentrant") for given in options if given)


def enable_checkpointing(model: Any, use_reentrant: bool = False) -> None:
    """Trade time for memory in a transformers model, with or without adapters."""
    _checkpointing(model, "enable")({"use_reentrant": use_reentrant})


def disable_checkpointing(model: Any) -> None:
    """The opposite."""
    _checkpointing(model, "disable")()


def _checkpointing(model: Any, verb: str) -> Callable[..., None]:
    renamed = getattr(model, f"activation_checkpointing_{verb}", None)
    return renamed or getattr(model, f"gradient_checkpointing_{verb}")


#: What transformers' `load_adapter` calls on the model, and what that returns first says which names found no place.
_LOADING = "_load_pretrained_model"


def when_loaded(model: Any, check: Callable[[list[str]], None]) -> None:
    """Let `check` see, once, which names of a file transformers' own `load_adapter` found no place for.

    Who comes that way is also told which of transformers' methods do not work with the installed PEFT.

    Args:
        model: a transformers model, of which an adapter is being made; others have no such method.
        check: a function that can be pickled; may raise.
    """
    if hasattr(type(model), _LOADING):
        vars(model)[_LOADING] = functools.partial(_checked_loading, check)


def not_loaded(model: Any) -> None:
    """Nothing is to be looked at any more."""
    vars(model).pop(_LOADING, None)


def _checked_loading(check: Callable[[list[str]], None], *args: Any, **kwargs: Any) -> Any:
    model = kwargs["model"] if "model" in kwargs else args[0]
    not_loaded(model)
    found = getattr(model, _LOADING)(*args, **kwargs)
    check(sorted(found[0].unexpected_keys))
    installed = metadata.version("peft")
    if Version(installed) < Version(MIN_PEFT_VERSION):
        warnings.warn(
            f"load_adapter has loaded the memory, and it is on. transformers {metadata.version('transformers')} wants "
            f"PEFT >= {MIN_PEFT_VERSION} (found {installed}) in its other methods, so set_adapter, disable_adapters, "
            "enable_adapters, add_adapter, delete_adapter and save_pretrained will refuse. To use those, load with "
            "PeftModel.from_pretrained(model, folder) or keepsight.load(folder) instead, which need no newer PEFT.",
            KeepsightWarning,
            stacklevel=3,
        )
    return found


def processor_takes(processor: Any, name: str) -> bool:
    """Whether a processor takes a text argument: by the signature of its call, or by the type of its `text_kwargs`."""
    kind = type(processor)
    typed = getattr(getattr(kind, "valid_processor_kwargs", None), "__annotations__", {}).get("text_kwargs")
    return name in inspect.signature(kind.__call__).parameters or name in getattr(typed, "__annotations__", {})


def before_upload(owners: Iterable[Any], publishing: Callable[..., Any], finish: Callable[[Path], None]) -> None:
    """Have `push_to_hub` of these classes tell `save_pretrained` that it publishes, and finish what it then sends.

    Theirs tells `save_pretrained` nothing, and a memory that is sent must name no folder of this machine.

    Args:
        owners: classes with a `push_to_hub` and transformers' upload behind it.
        publishing: wraps their `push_to_hub`.
        finish: called with the folder of files before they are sent.
    """

    def send(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        finish(Path(working_dir))
        return PushToHubMixin._upload_modified_files(self, working_dir, *args, **kwargs)

    for owner in owners:
        owner.push_to_hub, owner._upload_modified_files = publishing(owner.push_to_hub), send
