"""A base model by name, looked at before its weights are read: is it there, whole, and of a family we know?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from keepsight.backbone import family_of
from keepsight.errors import KeepsightError
from keepsight.shipped import resolve_base


def base_config(source: str | Path, revision: str | None = None) -> Any:
    """The configuration of a VLM, from a folder or the hub.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing of that name can be reached on the hub.
        UnsupportedModelError: if it is not a vision-language model that keepsight knows.
    """
    path = resolve_base(source)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise KeepsightError(f"{source} is a file; a model is a folder (with config.json) or a hub id.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        hint = ""
        if any(folder.glob("checkpoint-*/adapter_config.json")):
            hint = " It holds checkpoints of an unfinished training run; name one of them, or finish it with --resume."
        raise FileNotFoundError(
            f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json).{hint}"
        )
    if not folder.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") > 1):
        raise FileNotFoundError(f"{source}: no such folder.")
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"{source}: no such folder here, and no model of that name can be reached on the Hugging Face hub. "
            "Check the name, your connection, and whether the model needs a login (hf auth login)."
        ) from error
    except (ValueError, KeyError) as error:
        raise KeepsightError(
            f"{source}: its config.json cannot be used ({' '.join(str(error).split())[:300]})"
        ) from error
    family_of(config, str(source))
    if hasattr(config, "keepsight_pvm"):
        raise KeepsightError(
            f"{source} is an export for vLLM, whose memory only vLLM would find. Serve it (vllm serve {source}), or "
            "load the adapter that it was made from."
        )
    return config


def check_weights(source: str | Path) -> None:
    """Find missing and truncated weight files of a local model by their headers, without reading the weights.

    Raises:
        KeepsightError: naming the file. A hub id is left to the hub's own checks.
    """
    folder = Path(resolve_base(source)).expanduser()
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (ValueError, KeyError, AttributeError) as error:
        raise KeepsightError(f"{index} is not a whole index of weight files. Copy it again.") from error
    for name in sorted(names):
        file = folder / name
        if not file.is_file():
            raise KeepsightError(f"{source}: the weights {name} are missing. (Pickled .bin weights are never read.)")
        size = file.stat().st_size
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header: Any = json.loads(stream.read(length) if length < size else b"")
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KeepsightError(f"{file} is not a whole safetensors file ({size:,} bytes). Copy it again.") from error
        whole = 8 + length + max(ends, default=0)
        if size != whole:
            raise KeepsightError(
                f"{file} is cut off or damaged: {size:,} bytes where its header tells of {whole:,}. Copy it again."
            )
