"""`keepsight.load`: a model with its memory, and its processor, from one name."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor

from keepsight.checkpoints.adapters import MEMORIES, AdapterInfo, has_processor
from keepsight.checkpoints.attention import check_attention, kernel_named
from keepsight.checkpoints.bases import read_base
from keepsight.checkpoints.sources import check_sources
from keepsight.errors import AdapterMismatchError, KeepsightError, KeepsightWarning
from keepsight.installed import MissingExtraError
from keepsight.shipped import resolve_base
from keepsight.tested import warn_of_untested
from keepsight.vismem import add_memory_tokens


def load(
    source: str | Path,
    *more: str | Path,
    base: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trainable: bool = False,
    **model_kwargs: Any,
) -> tuple[Any, Any]:
    """Load a VLM with its memory, and its processor.

    Args:
        source: an adapter (a folder or a hub id), or a plain VLM (a folder or a hub id). "keepsight/reference" is the
            small VLM that ships with keepsight.
        more: further adapters for the same model, e.g. a LoRA beside a memory.
        base: the base model; default: the one recorded in the adapter.
        dtype: of the base and the adapters; "auto" is the checkpoint's own (float32 for a float16 one on a CPU, which
            computes in float16 slowly and badly).
        device: where to put the model; default: the GPU if there is one. Ignored if `device_map` is given.
        revision: hub revision of `source`.
        trainable: leave the adapters' gradients on.
        model_kwargs: passed to `AutoModelForImageTextToText.from_pretrained`, e.g. `attn_implementation`.

    Returns:
        (model, processor); the model in eval mode, a `PeftModel` if there is an adapter.

    Raises:
        BrokenAdapterError: if an adapter's files are missing, truncated or not finite.
        AdapterMismatchError: if the adapter was made for another base.
        UnsupportedModelError: if keepsight does not know the model's family.
        KeepsightError: if weights of the base are missing, truncated, or not those of its model, in full. All this
            before any weight is read (of a base on the hub: after its weights were).
    """
    base_name, adapters = check_sources(source, more, base, revision)
    if revision is not None and not adapters:
        model_kwargs["revision"] = revision
    return load_checked(base_name, adapters, dtype=dtype, device=device, trainable=trainable, **model_kwargs)


def load_checked(
    base_name: str,
    adapters: list[AdapterInfo],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trainable: bool = False,
    processor: Any = None,
    **model_kwargs: Any,
) -> tuple[Any, Any]:
    """`load`, for what `keepsight.checkpoints.sources.check_sources` has checked and found, `load_processor` read."""
    model = _read(base_name, dtype=dtype, device=device, **model_kwargs)
    return _complete(model, base_name, adapters, trainable, processor)


def load_several(
    base_name: str,
    adapters: Mapping[str, list[AdapterInfo]],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    **model_kwargs: Any,
) -> dict[str, tuple[Any, Any]]:
    """Several models on one base, whose weights they share: each has modules of its own, so that nothing that is done
    to one of them is done to another.

    Args:
        base_name: of the base.
        adapters: for each model, what `keepsight.checkpoints.sources.check_sources` has checked and found; may be none.
        dtype: as for `load`.
        device: as for `load`.
        model_kwargs: as for `load`.

    Returns:
        For each name, (model, processor) as `load` returns them.

    Raises:
        KeepsightError: if an adapter changes weights of the base, which the others would then get too.
    """
    base = _read(base_name, dtype=dtype, device=device, **model_kwargs)
    if len(adapters) == 1:
        return {name: _complete(base, base_name, own) for name, own in adapters.items()}
    shared = [*base.parameters(), *base.buffers()]
    found = {}
    for name, own in adapters.items():
        before = [tensor._version for tensor in shared]
        found[name] = _complete(twin(base), base_name, own)
        if [tensor._version for tensor in shared] != before:
            raise KeepsightError(
                f"{name} brings weights of the base itself (an embedding, biases), which every model on it would get. "
                "Serve it by itself: keepsight serve ADAPTER, on a port of its own."
            )
    return found


def twin(model: Any) -> Any:
    """Another model of the same weights: modules of its own, parameters and buffers shared."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _read(base_name: str, dtype: str | torch.dtype, device: str | torch.device | None, **model_kwargs: Any) -> Any:
    """The base, where it is to be."""
    warn_of_untested()
    kernel = model_kwargs.get("attn_implementation")
    if isinstance(kernel, str):
        model_kwargs["attn_implementation"] = kernel = kernel_named(kernel)
        check_attention(base_name, kernel, device, dtype, revision=model_kwargs.get("revision"))
    if device is None and "device_map" not in model_kwargs:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = read_base(resolve_base(base_name), dtype=dtype, **model_kwargs)
    if device is not None:
        model = model.to(device)
        if dtype == "auto" and torch.device(device).type == "cpu" and model.dtype == torch.float16:
            model = model.float()
    return model


def load_processor(base_name: str | Path, adapters: Sequence[AdapterInfo] = ()) -> Any:
    """The processor that stands beside the first of the adapters that has one; else the base's.

    Raises:
        MissingExtraError: if the libraries that read images are not installed.
        KeepsightError: if its files are missing or broken.
    """
    source = next((a.path for a in adapters if has_processor(a.path)), base_name)
    try:
        return AutoProcessor.from_pretrained(resolve_base(source), trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        if any(find_spec(library) is None for library in ("PIL", "torchvision")):
            raise MissingExtraError("Images are read with Pillow and torchvision.", "lab") from error
        raise KeepsightError(
            f"{source}: its processor cannot be loaded ({' '.join(str(error).split())[:200]}). A VLM's folder holds "
            "processor_config.json (or preprocessor_config.json) and a tokenizer beside the weights."
        ) from error


def _complete(
    model: Any, base_name: str, adapters: list[AdapterInfo], trainable: bool = False, processor: Any = None
) -> tuple[Any, Any]:
    """A base with its adapters, and their processor."""
    processor = load_processor(base_name, adapters) if processor is None else processor
    rows = {info.embedding_rows for info in adapters if info.embedding_rows is not None}
    if len(rows) > 1:
        raise AdapterMismatchError(f"The adapters bring embeddings of different sizes: {sorted(rows)} rows.")
    for count in rows - {model.get_input_embeddings().num_embeddings}:
        model.resize_token_embeddings(count, mean_resizing=False)  # the adapter fills it
    if not any(has_processor(info.path) for info in adapters):
        _warn_of_words_beyond(processor, model, base_name)
    model = attach(model, adapters, trainable=trainable)
    if any(info.method == "VISMEM" for info in adapters):
        add_memory_tokens(processor, model)
    return model.eval(), processor


def _warn_of_words_beyond(processor: Any, model: Any, base_name: str) -> None:
    """A base may be published with words that it never learned; a prompt that holds one ends in an IndexError."""
    words, rows = processor.tokenizer.get_vocab(), model.get_input_embeddings().num_embeddings
    beyond = sorted((index, word) for word, index in words.items() if index >= rows)
    if beyond:
        warnings.warn(
            f"The tokenizer of {base_name} knows {len(words)} tokens, its model has embeddings for {rows}: a prompt "
            f"with {beyond[0][1]!r} (number {beyond[0][0]}) cannot be read. Where tokens were added, resize the "
            "embedding before the model is saved: model.resize_token_embeddings(len(tokenizer)).",
            KeepsightWarning,
            stacklevel=4,
        )


def attach(model: Any, adapters: list[AdapterInfo], trainable: bool = False) -> Any:
    """Put checked adapters on a model: the first as "default", the others under their folder's name."""
    result = model
    taken: dict[str, str] = {}  # adapter name -> method
    # Other methods first: a memory leaves the gradients of adapters that were there before it alone.
    for info in sorted(adapters, key=lambda a: {"VISMEM": 1, "PVM": 2}.get(a.method, 0)):
        name = "default" if not taken else info.path.name.replace(".", "_")
        while name in taken:
            name += "_"
        if info.method in taken.values():
            result.load_adapter(info.path, name, is_trainable=trainable, autocast_adapter_dtype=False)
        else:
            with _left_where_it_is(model) if info.method in MEMORIES else contextlib.nullcontext():
                result = PeftModel.from_pretrained(
                    model, info.path, adapter_name=name, is_trainable=trainable, autocast_adapter_dtype=False
                )
        taken[name] = info.method
    return result


@contextlib.contextmanager
def _left_where_it_is(model: Any) -> Iterator[None]:
    """PEFT divides a model that is partly offloaded anew, for the sake of adapters that wrap its layers; a memory hangs
    beside them, and needs none of it."""
    place = vars(model).pop("hf_device_map", None)
    try:
        yield
    finally:
        if place is not None:
            model.hf_device_map = place
