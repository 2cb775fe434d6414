"""Shared table of what happens to checkpoint files on their way, for every kind of folder and every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def _largest(tensors: Tensors) -> str:
    return max(tensors, key=lambda name: (tensors[name].numel(), name))


def _without(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != _largest(tensors)}


def _taller(tensors: Tensors) -> Tensors:
    name = _largest(tensors)
    return tensors | {name: torch.cat([tensors[name], tensors[name]])}


def with_one_nan(tensors: Tensors) -> Tensors:
    """The very last value of the largest."""
    tensors[_largest(tensors)].view(-1)[-1] = float("nan")
    return tensors


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


#: What is done to an adapter's tensors.
ADAPTER = {
    "another layout": _renamed(".language_model.", "."),
    "a wrapper's names": _renamed("base_model.model.", "base_model.model.module."),
    "a wrapper around all": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "without PEFT's prefix": _renamed("base_model.model.", ""),
    "one missing": _without,
    "one too many": lambda tensors: tensors | {f"{_largest(tensors)}.more": torch.ones(2)},
    "another shape": _taller,
    "whole numbers": lambda tensors: {name: tensor.to(torch.int32) for name, tensor in tensors.items()},
}

#: What is done to a base's tensors.
BASE = {
    "one missing": _without,
    "one too many": lambda tensors: tensors | {f"{_largest(tensors)}.more": torch.ones(2)},
    "another layout": _renamed("language_model.", "decoder."),
    "a wrapper's names": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "another shape": _taller,
}


def spoil(folder: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint folder, of an adapter or a base, whose tensors were changed, shards and all."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("checkpoint-*"))
    files = sorted(target.glob("*model*.safetensors"))
    shards = [load_file(file) for file in files]
    changed = change({name: tensor for shard in shards for name, tensor in shard.items()})
    for file, shard in zip(files, shards, strict=True):
        rest = changed if file == files[-1] else {name: changed.pop(name) for name in shard if name in changed}
        save_file(rest, file, metadata={"format": "pt"})
    index = target / "model.safetensors.index.json"
    if index.is_file():
        names = {name: file.name for file in files for name in load_file(file)}
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return target
