"""Checkpoints of the PVM authors' fork of Qwen3-VL, read by their headers and checked: which tensor goes where.

Such a folder holds Qwen3-VL weights plus `model.language_model.layers.{i}.pvm_block.*`, and `pvm_layers` and
`pvm_hidden_size` in the `text_config` of its config.json.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import keepsight.pvm  # noqa: F401 - makes PVM known to PEFT
from keepsight.checkpoints.shards import CheckpointError, StoredTensor, read_header, read_json, weight_files
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.pvm.config import PvmConfig

BASE, ADAPTER = "base", "adapter"
_PREFIX, _BLOCK = "model.language_model.layers.", ".pvm_block."


class ConversionError(CheckpointError):
    """The folder cannot be converted; nothing was written."""


@dataclass(frozen=True)
class Plan:
    """What a checkpoint of the authors' is taken apart into.

    Attributes:
        config: content of the base's config.json, under transformers' own names.
        shards: the base's tensors, one list per file that will be written.
        adapter_config: the memory's.
        block_tensors: name in the adapter -> tensor in the checkpoint.
        block_shapes: name in the adapter -> shape there.
    """

    config: dict[str, Any]
    shards: list[list[StoredTensor]]
    adapter_config: PvmConfig
    block_tensors: dict[str, StoredTensor]
    block_shapes: dict[str, tuple[int, ...]]

    @property
    def base_size(self) -> int:
        """Bytes of the base's tensors."""
        return sum(tensor.size for shard in self.shards for tensor in shard)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return self.base_size + sum(tensor.size for tensor in self.block_tensors.values())


def plan_conversion(folder: Path) -> Plan:
    """Read the headers of a checkpoint and check that it is the authors', in full.

    Raises:
        CheckpointError: if files are missing or damaged.
        ConversionError: if it is no such checkpoint.
    """
    if not folder.is_dir():
        raise ConversionError(
            f"{folder} is no folder. SRC is a checkpoint folder on this machine; to fetch one from the Hub: "
            "hf download NAME --local-dir FOLDER."
        )
    config = read_json(folder / "config.json", "a checkpoint folder has a config.json beside its weights")
    shards = [read_header(file) for file in weight_files(folder)]
    base: dict[str, StoredTensor] = {}
    blocks: dict[str, StoredTensor] = {}
    for tensor in (t for shard in shards for t in shard):
        kind = blocks if _BLOCK in tensor.name else base
        if tensor.name in kind:
            first, second = kind[tensor.name].file.name, tensor.file.name
            raise ConversionError(f"{tensor.name} stands in two files, {first} and {second}.")
        kind[tensor.name] = tensor
    _check_architecture(folder, config)
    if not blocks:
        raise ConversionError(
            f"{folder} has no visual memory: no tensor is called {_PREFIX}(number){_BLOCK}*. A plain Qwen3-VL needs no "
            "conversion; keepsight.load takes it as it is."
        )
    layers, width = _memory_settings(folder, config["text_config"], blocks)
    config = _plain_config(config)
    try:
        with torch.device("meta"):
            model: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    except Exception as error:  # whatever transformers makes of a config that is not right
        raise ConversionError(f"transformers cannot build a Qwen3-VL from {folder / 'config.json'}: {error}") from error
    _compare(folder, base, model.state_dict(), "the base model", model.all_tied_weights_keys)

    model.name_or_path = f"../{BASE}"
    adapter_config = PvmConfig(layers=layers, width=width, causal=False)
    try:
        with torch.device("meta"):
            expected: Any = get_peft_model_state_dict(
                get_peft_model(model, adapter_config), save_embedding_layers=False
            )
    except KeepsightError:
        raise
    except ValueError as error:
        raise ConversionError(
            f"{folder / 'config.json'}: text_config.pvm_layers or pvm_hidden_size: {error}"
        ) from error
    adapter_config.inference_mode, adapter_config.base_model_name_or_path = True, f"../{BASE}"
    names = {_name_in_checkpoint(name): name for name in expected}
    _compare(folder, blocks, {old: expected[new] for old, new in names.items()}, "the memory")
    return Plan(
        config=config,
        shards=[kept for shard in shards if (kept := [t for t in shard if t.name in base])],
        adapter_config=adapter_config,
        block_tensors={new: blocks[old] for old, new in names.items()},
        block_shapes={name: tuple(tensor.shape) for name, tensor in expected.items()},
    )


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    plain = ["".join(c for c in str(name).lower() if c.isalnum()) for name in names]
    # The fork's own names (such as PVMQwen3VLForConditionalGeneration) contain the family's.
    if not any("qwen3vl" in name for name in plain) or any("qwen3vlmoe" in name for name in plain):
        raise ConversionError(
            f"{folder} is not a dense Qwen3-VL: model_type {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')!r}. The PVM authors' code knows no other family, so there is nothing else "
            "to convert."
        )
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise ConversionError(f"{folder / 'config.json'} has no {part}, as every Qwen3-VL config does.")
    if config.get("quantization_config"):
        raise ConversionError(f"{folder} is quantised. Convert the 16- or 32-bit checkpoint, then quantise.")


def _memory_settings(folder: Path, text: dict[str, Any], blocks: Collection[str]) -> tuple[list[int], int]:
    """(layers, latent width) from the text config, compared with the layers that have tensors."""
    file = folder / "config.json"
    layers, width = text.get("pvm_layers"), text.get("pvm_hidden_size")
    others = sorted(k for k in text if k.startswith("pvm_") and k not in ("pvm_layers", "pvm_hidden_size"))
    if others:
        warnings.warn(
            f"{file}: text_config has {', '.join(others)}, which keepsight does not know and leaves out.",
            KeepsightWarning,
            stacklevel=2,
        )
    if not isinstance(layers, list) or any(type(i) is not int for i in layers):
        raise ConversionError(f"{file}: text_config.pvm_layers is {layers!r}; expected a list such as [8, 16, 24].")
    if type(width) is not int or width < 1:
        raise ConversionError(f"{file}: text_config.pvm_hidden_size is {width!r}; expected a width such as 512.")
    found = set()
    for name in blocks:
        index = name.removeprefix(_PREFIX).partition(_BLOCK)[0]
        if not name.startswith(_PREFIX) or not index.isdigit():
            raise ConversionError(f"{name} is not where the memory's tensors stand, {_PREFIX}(number){_BLOCK}*.")
        found.add(int(index))
    if found != set(layers):
        raise ConversionError(
            f"{file} says pvm_layers {sorted(set(layers))}, but the weights hold blocks at layers {sorted(found)}. "
            "Config and weights belong to different checkpoints, or weights are missing."
        )
    return sorted(found), width


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the base alone, under transformers' own names."""

    def without_memory(part: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in part.items() if not k.startswith("pvm_") and k != "auto_map"}

    plain = without_memory(config)
    plain |= {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    plain["text_config"] = without_memory(config["text_config"]) | {"model_type": "qwen3_vl_text"}
    vision = without_memory(config["vision_config"])
    if vision.get("model_type") not in ("qwen3_vl", "qwen3_vl_vision"):
        vision.pop("model_type", None)
    plain["vision_config"] = vision
    return plain


def _name_in_checkpoint(name: str) -> str:
    """`base_model.model.model.language_model.layers.8.visual_memory.pvm_blocks.gate` -> the authors' name."""
    layer, _, rest = name.partition(_PREFIX)[2].partition(".visual_memory.pvm_blocks.")
    return f"{_PREFIX}{layer}{_BLOCK}{'gate_alpha' if rest == 'gate' else rest}"


def _compare(
    folder: Path,
    found: Mapping[str, StoredTensor],
    expected: Mapping[str, torch.Tensor],
    of: str,
    may_lack: Collection[str] = (),
) -> None:
    """Complain about the first missing, unknown or misshaped tensor, with the number of its kind."""
    missing = sorted(expected.keys() - found.keys() - set(may_lack))
    extra = sorted(found.keys() - expected.keys())
    if missing:
        raise ConversionError(
            f"{folder} lacks {len(missing)} of the {len(expected)} tensors of {of}, the first: {missing[0]}."
        )
    if extra:
        raise ConversionError(
            f"{folder} holds {len(extra)} tensors that are no part of {of} as config.json describes it, the first: "
            f"{extra[0]}."
        )
    for name, tensor in found.items():
        shape = tuple(expected[name].shape)
        if tensor.shape != shape and not (name.endswith(".gate_alpha") and tensor.shape == ()):
            raise ConversionError(f"{folder}: {name} has shape {tensor.shape}; config.json asks for {shape}.")
