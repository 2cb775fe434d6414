"""What `keepsight.load` is asked for, checked before any weight of the base is read: adapters, base, and their fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from keepsight.checkpoints.adapters import CONFIG, AdapterInfo, find_adapter, inspect_adapter
from keepsight.checkpoints.bases import base_config, check_weights, refuse_address
from keepsight.checkpoints.fit import check_fit, check_words
from keepsight.errors import BrokenAdapterError, KeepsightError, KeepsightWarning, UnsupportedModelError
from keepsight.shipped import REFERENCE_NAME, resolve_base

#: In a memory's folder: the language model that was trained with it, as a LoRA (loaded beside it) or whole (its base).
POLICY = "policy"


def as_adapter(source: str | Path, revision: str | None = None) -> AdapterInfo | None:
    """The checked adapter that `source` names, or None if it names a plain model.

    Raises:
        FileNotFoundError: if it names a folder that is not there.
        BrokenAdapterError: if the adapter's files are damaged.
    """
    refuse_address(source)
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
        base_name = _base_of(first, source, base)
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
        check_fit(info, base_name, config)
        check_words(info, base_name, config)
        _warn_of_another_base(info, base_name)
    check_weights(base_name)
    return base_name, infos


def check_recorded(info: AdapterInfo) -> bool:
    """Check an adapter, and what lies beside it, against the base that it records, if that can be read here.

    Returns:
        Whether there was a base to compare with.

    Raises:
        KeepsightError: if anything does not fit.
    """
    beside = info.path / POLICY
    infos = [info, inspect_adapter(beside)] if (beside / CONFIG).is_file() else [info]
    try:
        base = _base_of(info, info.path, None)
        config = base_config(base, local=True)
    except (FileNotFoundError, UnsupportedModelError, BrokenAdapterError):
        return False
    for each in infos:
        check_fit(each, base, config)
        check_words(each, base, config)
    return True


def _base_of(first: AdapterInfo, source: str | Path, base: str | Path | None) -> str:
    """The base that was named, or else recorded; "./policy" is beside the adapter."""
    base_name = str(base or first.base or "")
    if not base_name:
        raise BrokenAdapterError(
            f"{source} does not say which base model it belongs to. Name it: base=MODEL, "
            "or --base MODEL on the command line."
        )
    beside = first.path / base_name
    return str(beside.resolve()) if base is None and base_name.startswith(".") and beside.is_dir() else base_name


def _warn_of_another_base(info: AdapterInfo, base: str) -> None:
    if info.base is not None and not _same_base(info, base):
        warnings.warn(
            f"{info.path} was trained on {info.base} and is put on {base}. The shapes fit; whether the weights do, "
            "nobody has checked.",
            KeepsightWarning,
            stacklevel=3,
        )


def _same_base(info: AdapterInfo, base: str) -> bool:
    names = {info.base, str(info.path / (info.base or ""))}
    paths = {str(Path(str(resolve_base(name))).expanduser().resolve()) for name in names if name}
    return base in names or str(Path(str(resolve_base(base))).expanduser().resolve()) in paths
