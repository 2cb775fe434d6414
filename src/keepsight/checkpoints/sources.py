"""What `keepsight.load` is asked for, checked before any weight of the base is read: adapters, base, and their fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from keepsight.checkpoints.adapters import CONFIG, AdapterInfo, find_adapter, inspect_adapter
from keepsight.checkpoints.bases import base_config, check_weights
from keepsight.errors import AdapterMismatchError, BrokenAdapterError, KeepsightError, KeepsightWarning
from keepsight.peft_method import config_from_adapter
from keepsight.pvm import PvmConfig
from keepsight.shipped import REFERENCE_NAME, resolve_base
from keepsight.vismem import VisMemConfig

#: In a memory's folder: the language model that was trained with it, as a LoRA (loaded beside it) or whole (its base).
POLICY = "policy"

_MEMORIES: dict[str, Any] = {"PVM": PvmConfig, "VISMEM": VisMemConfig}


def as_adapter(source: str | Path, revision: str | None = None) -> AdapterInfo | None:
    """The checked adapter that `source` names, or None if it names a plain model.

    Raises:
        FileNotFoundError: if it names a folder that is not there.
        BrokenAdapterError: if the adapter's files are damaged.
    """
    path, source = Path(source).expanduser(), str(source)
    if source == REFERENCE_NAME:
        return None
    if path.is_file():
        raise KeepsightError(f"{source} is a file; name the folder that holds {CONFIG} (or config.json, for a model).")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        hint = " A hub id looks like owner/name." if "/" not in source else ""
        raise FileNotFoundError(f"{source}: no such folder.{hint}")
    found = find_adapter(source, revision)
    if found is None and path.is_dir() and (path / "adapter_model.safetensors").is_file():
        return inspect_adapter(path)  # says that the configuration is missing
    return None if found is None else inspect_adapter(found)


def check_sources(
    source: str | Path, adapters: Sequence[str | Path] = (), base: str | Path | None = None, revision: str | None = None
) -> tuple[str, list[AdapterInfo]]:
    """Check that all adapters are whole and were made for the base they will be put on.

    Args:
        source: an adapter or a plain model.
        adapters: further adapters.
        base: the base model, where the recorded one is to be replaced.
        revision: hub revision of `source`.

    Returns:
        (name of the base, the adapters in order).

    Raises:
        KeepsightError, FileNotFoundError: if anything does not fit.
    """
    first = as_adapter(source, revision)
    infos = [] if first is None else [first]
    if first is not None and (first.path / POLICY / CONFIG).is_file():
        infos.append(inspect_adapter(first.path / POLICY))
    for name in adapters:
        info = as_adapter(name)
        if info is None:
            raise BrokenAdapterError(f"{name} is no adapter: it has no {CONFIG}. A plain model can only come first.")
        infos.append(info)
    if first is None:
        if base is not None:
            raise KeepsightError(f"{source} is a plain model and no adapter, so the base {base} has no use.")
        base_name = str(source)
    else:
        base_name = str(base or first.base or "")
        if not base_name:
            raise BrokenAdapterError(
                f"{source} does not say which base model it belongs to. Name it: base=MODEL, "
                "or --base MODEL on the command line."
            )
        beside = first.path / base_name
        if base is None and base_name.startswith(".") and beside.is_dir():
            base_name = str(beside.resolve())
    try:
        config = base_config(base_name, revision if first is None else None)
    except FileNotFoundError as error:
        if first is None or base is not None:
            raise
        raise FileNotFoundError(
            f"{source} was made for {base_name}, which cannot be found ({str(error).rstrip('.')}). If the base is "
            "somewhere else, name it: base=FOLDER, or --base FOLDER on the command line."
        ) from error
    for info in infos:
        _check_fit(info, base_name, config)
    check_weights(base_name)
    return base_name, infos


def _check_fit(info: AdapterInfo, base: str, config: Any) -> None:
    if info.method in _MEMORIES:
        config_from_adapter(_MEMORIES[info.method], info.config).check_base(config)
    else:
        _check_shapes(info, base, config)
    if info.base is not None and not _same_base(info, base):
        warnings.warn(
            f"{info.path} was trained on {info.base} and is put on {base}. The shapes fit; whether the weights do, "
            "nobody has checked.",
            KeepsightWarning,
            stacklevel=2,
        )


def _check_shapes(info: AdapterInfo, base: str, config: Any) -> None:
    """Whether a LoRA's matrices fit the layers they name."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    for name, shape in info.shapes.items():
        path, found, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if not found or len(shape) != 2:
            continue
        try:
            weight = model.get_submodule(path).weight
        except AttributeError:
            weight = None
        side = 1 if ".lora_A" in name else 0  # A reads the layer's input, B writes its output
        if weight is None or weight.shape[side] != shape[side]:
            here = "there is no such layer" if weight is None else f"the layer there is {tuple(weight.shape)}"
            raise AdapterMismatchError(
                f"{info.path} was made for another base model ({info.base}) than {base}: {path} got a {info.method} "
                f"of shape {shape}, and {here}. Load it on {info.base}."
            )


def _same_base(info: AdapterInfo, base: str) -> bool:
    names = {info.base, str(info.path / (info.base or ""))}
    paths = {str(Path(str(resolve_base(name))).expanduser().resolve()) for name in names if name}
    return base in names or str(Path(str(resolve_base(base))).expanduser().resolve()) in paths
