"""What every memory checks when its weights are loaded or saved: all that is stored is used, all that is used came.

PEFT loads what fits a model's names and leaves the rest as it was made, random, with a warning or without.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn

from keepsight.errors import AdapterMismatchError, BrokenAdapterError, KeepsightWarning
from keepsight.shipped import resolve_base

#: What PEFT writes before every name in an adapter's file.
STORED_PREFIX = "base_model.model."

RESIZED_REMEDY = (
    "Save the resized base too (model.unload().save_pretrained(FOLDER), once the memory is saved) and load the memory "
    "with base=FOLDER, or --base FOLDER; or save the embedding in the adapter: "
    "model.save_pretrained(FOLDER, save_embedding_layers=True)."
)
_MADE = "_keepsight_as_made"


def is_embedding(name: str) -> bool:
    """Whether a stored tensor is the base's embedding or head, which `save_embedding_layers=True` puts into a file."""
    return any(name.endswith(f".{layer}.weight") for layer in EMBEDDING_LAYER_NAMES)


def most_alike(name: str, names: Iterable[str]) -> str:
    """The one of some names that ends most like a name: what it was probably called."""

    def common(other: str) -> int:
        pairs = zip(reversed(other), reversed(name), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    return max(names, key=common)


def check_tensors(stored: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse a memory's stored tensors unless they are, in full, those that it has.

    Args:
        stored: name in the file -> tensor, on any device (meta will do).
        expected: name in the file -> the tensor that it is for.
        where: what holds them, for the error.

    Raises:
        BrokenAdapterError: naming one stored and one expected tensor.
    """
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing and extra:
        raise BrokenAdapterError(
            f"{where}: {len(missing)} of the memory's {len(expected)} tensors are not there under their names. Stored "
            f"is, for example, {most_alike(missing[0], extra)}; expected is {missing[0]}. Names change when a file is "
            "written from a wrapped model (module.), without PEFT (no base_model.model.) or for another layout of the "
            "base: write it with save_pretrained of the model that get_peft_model returned, or rename its tensors."
        )
    if missing:
        example = most_alike(missing[0], stored) if stored else "nothing"
        raise BrokenAdapterError(
            f"{where} lacks {len(missing)} of the {len(expected)} tensors of its memory: expected is, for example, "
            f"{missing[0]}; stored is {example}. Copy it again or use an earlier checkpoint."
        )
    if extra:
        raise BrokenAdapterError(
            f"{where} holds {len(extra)} tensors that its memory has not: stored is, for example, {extra[0]}; expected "
            f"is {most_alike(extra[0], expected)}. Its configuration and its weights belong to different adapters: "
            "copy both again."
        )
    for name, tensor in expected.items():
        found = stored[name]
        if tensor.numel() and found.shape != tensor.shape:  # none here: another process holds it (DeepSpeed)
            raise BrokenAdapterError(
                f"{where}: {name} has shape {tuple(found.shape)}; expected is {tuple(tensor.shape)}. Its configuration "
                "and its weights belong to different adapters: copy both again."
            )
        if found.is_floating_point() != tensor.is_floating_point():
            raise BrokenAdapterError(
                f"{where}: {name} is stored as {found.dtype}; expected is a kind of number like {tensor.dtype}. A "
                "memory is stored as it is computed with, in 16 or 32 bits: write it with save_pretrained."
            )


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Refuse a stored tensor that holds NaN or infinite values.

    Args:
        name: in the file.
        tensor: as stored; one on the meta device, whose values were looked at before, passes.
        where: what holds it, for the error.

    Raises:
        BrokenAdapterError: naming the tensor.
    """
    if tensor.is_meta:
        return
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch does not ask 8-bit numbers
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise BrokenAdapterError(
            f"{where}: {bad} of {tensor.numel()} values of {name} are NaN or infinite. The training run that wrote it "
            "diverged; use an earlier checkpoint or train with a lower learning rate."
        )


def check_stored(
    state_dict: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    present: Mapping[str, torch.Tensor],
    adapter_name: str,
) -> None:
    """Refuse a state dict that PEFT is about to load unless it is, in full, that of a memory (and an embedding).

    Args:
        state_dict: as the file names it.
        own: the memory's tensors, likewise.
        present: all tensors of the model that it is loaded into.
        adapter_name: for errors.

    Raises:
        BrokenAdapterError: as `check_tensors`, and as `check_finite`.
        AdapterMismatchError: for an embedding of another size than the base's.
    """
    stored = dict(state_dict)
    if not any(name.startswith(STORED_PREFIX) for name in present):
        # Injected without a PeftModel: PEFT takes names with and without its prefix.
        stored = {name.removeprefix(STORED_PREFIX): tensor for name, tensor in stored.items()}
    embeddings = {name: present[name] for name in stored if is_embedding(name) and name in present}
    for name, tensor in embeddings.items():
        if tensor.numel() and stored[name].shape != tensor.shape:
            raise AdapterMismatchError(
                f"The adapter {adapter_name!r} holds an embedding of {len(stored[name])} rows; the base has "
                f"{len(tensor)}. Give the base as many before the adapter is loaded: "
                f"model.resize_token_embeddings({len(stored[name])}). (keepsight.load does.)"
            )
    where = f"The file of the adapter {adapter_name!r}"
    check_tensors(stored, {**own, **embeddings}, where)
    for name, tensor in stored.items():
        check_finite(name, tensor, where)


def check_placed(extra: Sequence[str], own: Mapping[str, torch.Tensor], fresh: set[str], adapter_name: str) -> None:
    """Refuse what transformers' `load_adapter` has made of a file, unless it is a memory's in full.

    Args:
        extra: names in the file that found no place.
        own: the memory's tensors, as its file names them.
        fresh: those of them that were not written to.
        adapter_name: for errors.

    Raises:
        BrokenAdapterError: as `check_tensors`, and as `check_finite`.
    """
    stored = {name: tensor for name, tensor in own.items() if name not in fresh}
    nothing, where = torch.empty(0, device="meta"), f"The file of the adapter {adapter_name!r}"
    check_tensors(stored | dict.fromkeys(extra, nothing), own, where)
    for name, tensor in stored.items():
        check_finite(name, tensor, where)


def remember_fresh(memory: nn.Module) -> None:
    """Remember that a memory holds the random weights it was made with."""
    vars(memory)[_MADE] = {name: _state(parameter) for name, parameter in memory.named_parameters()}


def forget_fresh(memory: nn.Module) -> None:
    """Its weights come now."""
    vars(memory).pop(_MADE, None)


def fresh_parameters(memory: nn.Module) -> list[str]:
    """What of a memory nobody has written to since it was made."""
    made = vars(memory).get(_MADE, {})
    return [name for name, parameter in memory.named_parameters() if made.get(name) == _state(parameter)]


def _state(parameter: torch.Tensor) -> tuple[int, int | None]:
    return id(parameter), None if parameter.is_inference() else parameter._version


def expect_weights(model: nn.Module, memories: Sequence[nn.Module]) -> None:
    """Let the first forward of a model fail if memories that were made for inference hold random weights by then.

    PEFT's loading asks the method, and is checked there. transformers' own `load_adapter` sets one parameter after the
    other and says only in a log which ones it did not.
    """

    def check(*_: Any) -> None:
        handle.remove()
        left = [name for memory in memories for name in fresh_parameters(memory)]
        if left:
            raise BrokenAdapterError(
                f"A memory was put on {type(model).__name__} for inference, and no weights came for {len(left)} of its "
                f"tensors, such as {left[0]}: they are random. The names in its file do not fit; keepsight.load and "
                "PeftModel.from_pretrained say why. (For a new one, to be trained: inference_mode=False.)"
            )

    handle = model.register_forward_pre_hook(check)


def warn_of_resized_embedding(model: Any, base: str | None) -> None:
    """Warn if a model that is about to be saved as an adapter has another vocabulary than the base it will name."""
    try:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(resolve_base(str(base)), local_files_only=True, trust_remote_code=False)
        recorded = found.get_text_config()
        rows, before = model.get_input_embeddings().num_embeddings, recorded.vocab_size
    except (OSError, ValueError, KeyError, AttributeError):  # no base that can be read here: nothing to compare with
        return
    if rows != before:
        warnings.warn(
            f"The embedding has {rows} rows, that of {base} has {before}: it was resized, and an adapter does not hold "
            f"the base's embedding. Saved like this, the memory cannot be loaded with the new tokens. {RESIZED_REMEDY}",
            KeepsightWarning,
            stacklevel=2,
        )
