"""Names of models and adapters on the command line, checked before any weights are loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepsight.adapters import CONFIG, AdapterInfo, find_adapter, inspect_adapter
from keepsight.errors import AdapterMismatchError, BrokenAdapterError, KeepsightError, KeepsightWarning
from keepsight.lab.reference import REFERENCE_NAME
from keepsight.loading import resolve_base
from keepsight.train.plan import base_config


def debugging() -> bool:
    """Whether `--debug` was given."""
    return "KEEPSIGHT_DEBUG" in os.environ


def as_adapter(source: str, revision: str | None = None) -> AdapterInfo | None:
    """The checked adapter that `source` names, or None if it names a plain model.

    Raises:
        FileNotFoundError: if it names a folder that is not there.
        BrokenAdapterError: if the adapter's files are damaged.
    """
    if source == REFERENCE_NAME:
        return None
    path = Path(source).expanduser()
    if path.is_file():
        raise KeepsightError(f"{source} is a file; name the folder that holds {CONFIG} (or config.json, for a model).")
    if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        hint = " A hub id looks like owner/name." if "/" not in source else ""
        raise FileNotFoundError(f"{source}: no such folder.{hint}")
    found = find_adapter(source, revision)
    if found is None and path.is_dir() and (path / "adapter_model.safetensors").is_file():
        return inspect_adapter(path)  # says that the configuration is missing
    return None if found is None else inspect_adapter(found)


def check_sources(source: str, adapters: Sequence[str], base: str | None = None) -> tuple[str, list[AdapterInfo]]:
    """Check that all adapters are whole and were made for the base they will be put on.

    Args:
        source: an adapter or a plain model.
        adapters: further adapters.
        base: the base model, where the recorded one is to be replaced.

    Returns:
        (name of the base, the adapters in order).

    Raises:
        KeepsightError, FileNotFoundError: if anything does not fit.
    """
    first = as_adapter(source)
    infos = [] if first is None else [first]
    for name in adapters:
        info = as_adapter(name)
        if info is None:
            raise BrokenAdapterError(f"{name} is no adapter: it has no {CONFIG}. Name a plain model as SOURCE instead.")
        infos.append(info)
    if first is None:
        if base is not None:
            raise KeepsightError(f"{source} is a plain model, so --base {base} has no use.")
        base_name = source
    else:
        base_name = base or first.base or ""
        if not base_name:
            raise BrokenAdapterError(f"{source} does not say which base model it belongs to. Name it: --base MODEL.")
        beside = first.path / base_name
        if base is None and base_name.startswith("..") and beside.is_dir():
            base_name = str(beside.resolve())
    try:
        config = base_config(base_name)
    except FileNotFoundError as error:
        if first is None or base is not None:
            raise
        raise FileNotFoundError(
            f"{source} was made for {base_name}, which cannot be found ({str(error).rstrip('.')}). If the base is "
            "somewhere else, name it: --base FOLDER."
        ) from error
    for info in infos:
        _check_fit(info, base_name, config)
    return base_name, infos


def _check_fit(info: AdapterInfo, base: str, config: Any) -> None:
    text = config.get_text_config()
    found = {
        "base_model_type": config.model_type,
        "base_num_layers": text.num_hidden_layers,
        "base_hidden_size": text.hidden_size,
    }
    wrong = [n for n, value in found.items() if info.config.get(n) is not None and info.config[n] != value]
    if wrong:
        recorded = ", ".join(f"{n.removeprefix('base_').replace('_', ' ')} {info.config[n]}" for n in wrong)
        here = ", ".join(f"{found[n]}" for n in wrong)
        raise AdapterMismatchError(
            f"{info.path} was made for another base model ({info.base}: {recorded}) than {base} ({here}). Load it on "
            f"{info.base}, or train a new memory for {base}: keepsight train pvm {base} --data ... --output-dir ..."
        )
    if info.base is not None and not _same_base(info, base):
        warnings.warn(
            f"{info.path} was trained on {info.base} and is put on {base}. The shapes fit; whether the weights do, "
            "nobody has checked.",
            KeepsightWarning,
            stacklevel=2,
        )


def _same_base(info: AdapterInfo, base: str) -> bool:
    names = {info.base, str(info.path / (info.base or ""))}
    paths = {str(Path(str(resolve_base(name))).expanduser().resolve()) for name in names if name}
    return base in names or str(Path(str(resolve_base(base))).expanduser().resolve()) in paths


def load_model(source: str, adapters: Sequence[str], **options: Any) -> tuple[Any, Any]:
    """`keepsight.load`, with a lesson where PEFT finds shapes that do not fit.

    Raises:
        AdapterMismatchError: if an adapter's tensors do not fit the base.
    """
    from keepsight import load

    try:
        return load(source, *adapters, **options)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise AdapterMismatchError(
            f"An adapter's tensors do not fit this base: {str(error).strip().splitlines()[-1].strip()} It was made for "
            "another model."
        ) from error
