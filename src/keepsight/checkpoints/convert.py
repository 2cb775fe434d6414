"""Checkpoints of the PVM authors' fork of Qwen3-VL, taken apart into a plain base model and a PVM adapter.

In: a folder with Qwen3-VL weights plus `model.language_model.layers.{i}.pvm_block.*`, and `pvm_layers` and
`pvm_hidden_size` in the `text_config` of its config.json. Out: `base`, which plain transformers loads, and `adapter`,
which `keepsight.load` loads with it. Base tensors are copied byte for byte, a few MB at a time.

The adapter follows the published rule (`causal=False`): text before an image retrieves from it too.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

import keepsight.pvm  # noqa: F401 - makes PVM known to PEFT
from keepsight.checkpoints.adapters import WEIGHTS, inspect_adapter
from keepsight.checkpoints.atomic import new_folder
from keepsight.checkpoints.shards import (
    INDEX,
    SINGLE,
    CheckpointError,
    StoredTensor,
    copy_tensors,
    read_header,
    read_json,
    weight_files,
)
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.pvm.config import PvmConfig

BASE, ADAPTER = "base", "adapter"
_PREFIX, _BLOCK = "model.language_model.layers.", ".pvm_block."
_COPIED = (".json", ".jinja", ".txt", ".model")  # tokenizer, processor, generation settings, chat templates
_NOT_COPIED = ("config.json", INDEX, "trainer_state.json", "adapter_config.json")
_SPARE = 16 * 2**20  # bytes on top of the weights that must be free: headers, tokenizer and processor

#: Called with (what is being done, bytes done so far, bytes in all).
Progress = Callable[[str, int, int], object]


class ConversionError(CheckpointError):
    """The folder cannot be converted; nothing was written."""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        base: folder of the base model.
        adapter: folder of the PVM adapter.
        base_tensors: tensors in the base.
        base_bytes: bytes of the base's tensors.
        adapter_parameters: parameters in the adapter.
        gates: decoder layer -> value of its gate.
    """

    base: Path
    adapter: Path
    base_tensors: int
    base_bytes: int
    adapter_parameters: int
    gates: dict[int, float]


def convert(
    source: str | Path, target: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Conversion:
    """Convert a checkpoint folder in the PVM authors' layout.

    Everything is checked before anything is written; the result appears at `target` in one step or not at all.

    Args:
        source: folder with config.json and safetensors weights (one file, or shards with an index).
        target: folder to make; gets the folders `base` and `adapter`.
        overwrite: replace `target` if it is the result of an earlier conversion.
        progress: called as the bytes go by.

    Raises:
        CheckpointError: if files of `source` are missing or damaged.
        ConversionError: if `source` is not such a checkpoint or not finite; if `target` exists; if the disk has too
            little room.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    told = progress or (lambda task, done, total: None)
    checkpoint = _read_checkpoint(source)
    plan = _plan(checkpoint)
    _check_target(source, target, overwrite, plan.size)
    _check_finite(plan, told)
    with new_folder(target) as folder:
        _write_base(plan, folder / BASE, told)
        _write_adapter(plan, folder / ADAPTER)
        info = inspect_adapter(folder / ADAPTER)
    return Conversion(
        base=target / BASE,
        adapter=target / ADAPTER,
        base_tensors=sum(map(len, plan.shards)),
        base_bytes=sum(t.size for shard in plan.shards for t in shard),
        adapter_parameters=info.num_parameters,
        gates=info.gates,
    )


# --- reading ------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    folder: Path
    config: dict[str, Any]
    shards: list[list[StoredTensor]]  # one list per file


@dataclass(frozen=True)
class _Plan:
    source: Path
    config: dict[str, Any]  # of the base, normalised
    adapter_config: PvmConfig
    shards: list[list[StoredTensor]]  # the base's tensors, one list per file that will be written
    block_tensors: dict[str, StoredTensor]  # name in the adapter -> tensor in the checkpoint
    block_shapes: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def size(self) -> int:
        return sum(t.size for shard in self.shards for t in shard) + sum(t.size for t in self.block_tensors.values())


def _read_checkpoint(folder: Path) -> _Checkpoint:
    if not folder.is_dir():
        raise ConversionError(
            f"{folder} is no folder. SRC is a checkpoint folder on this machine; to fetch one from the Hub: "
            "hf download NAME --local-dir FOLDER."
        )
    config = read_json(folder / "config.json", "a checkpoint folder has a config.json beside its weights")
    shards = [read_header(file) for file in weight_files(folder)]
    seen: dict[str, Path] = {}
    for tensor in (t for shard in shards for t in shard):
        if tensor.name in seen:
            raise ConversionError(
                f"{tensor.name} stands in two files, {seen[tensor.name].name} and {tensor.file.name}."
            )
        seen[tensor.name] = tensor.file
    return _Checkpoint(folder, config, shards)


# --- checking ------------------------------------------------------------


def _plan(checkpoint: _Checkpoint) -> _Plan:
    folder = checkpoint.folder
    _check_architecture(checkpoint)
    blocks = {t.name: t for shard in checkpoint.shards for t in shard if _BLOCK in t.name}
    if not blocks:
        raise ConversionError(
            f"{folder} has no visual memory: no tensor is called {_PREFIX}(number){_BLOCK}*. A plain Qwen3-VL needs no "
            "conversion; keepsight.load takes it as it is."
        )
    layers, width = _memory_settings(checkpoint, blocks)
    config = _plain_config(checkpoint.config)
    try:
        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    except Exception as error:  # whatever transformers makes of a config that is not right
        raise ConversionError(f"transformers cannot build a Qwen3-VL from {folder / 'config.json'}: {error}") from error
    _check_base_tensors(checkpoint, model)

    model.name_or_path = f"../{BASE}"
    adapter_config = PvmConfig(layers=layers, width=width, causal=False)
    try:
        with torch.device("meta"):
            peft_model = get_peft_model(model, adapter_config)
            expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    except KeepsightError:
        raise
    except ValueError as error:
        raise ConversionError(
            f"{folder / 'config.json'}: text_config.pvm_layers or pvm_hidden_size: {error}"
        ) from error
    adapter_config.inference_mode, adapter_config.base_model_name_or_path = True, f"../{BASE}"
    names = {_name_in_checkpoint(name): name for name in expected}
    _compare(folder, blocks, {old: tuple(expected[new].shape) for old, new in names.items()}, "the memory", {})
    return _Plan(
        source=folder,
        config=config,
        adapter_config=adapter_config,
        shards=[kept for shard in checkpoint.shards if (kept := [t for t in shard if _BLOCK not in t.name])],
        block_tensors={new: blocks[old] for old, new in names.items()},
        block_shapes={name: tuple(tensor.shape) for name, tensor in expected.items()},
    )


def _check_architecture(checkpoint: _Checkpoint) -> None:
    config = checkpoint.config
    names = [config.get("model_type"), *(config.get("architectures") or [])]
    plain = ["".join(c for c in str(name).lower() if c.isalnum()) for name in names]
    # The fork's own names (such as PVMQwen3VLForConditionalGeneration) contain the family's.
    if not any("qwen3vl" in name for name in plain) or any("qwen3vlmoe" in name for name in plain):
        raise ConversionError(
            f"{checkpoint.folder} is not a dense Qwen3-VL: model_type {config.get('model_type')!r}, architectures "
            f"{config.get('architectures')!r}. The PVM authors' code knows no other family, so there is nothing else "
            "to convert."
        )
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise ConversionError(f"{checkpoint.folder / 'config.json'} has no {part}, as every Qwen3-VL config does.")
    if config.get("quantization_config"):
        raise ConversionError(f"{checkpoint.folder} is quantised. Convert the 16- or 32-bit checkpoint, then quantise.")


def _memory_settings(checkpoint: _Checkpoint, blocks: dict[str, StoredTensor]) -> tuple[list[int], int]:
    """(layers, latent width) from the config, compared with the layers that have tensors."""
    file, text = checkpoint.folder / "config.json", checkpoint.config["text_config"]
    layers, width = text.get("pvm_layers"), text.get("pvm_hidden_size")
    others = sorted(k for k in text if k.startswith("pvm_") and k not in ("pvm_layers", "pvm_hidden_size"))
    if others:
        warnings.warn(
            f"{file}: text_config has {', '.join(others)}, which keepsight does not know and leaves out.",
            KeepsightWarning,
            stacklevel=2,
        )
    if not isinstance(layers, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in layers):
        raise ConversionError(f"{file}: text_config.pvm_layers is {layers!r}; expected a list such as [8, 16, 24].")
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
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


def _check_base_tensors(checkpoint: _Checkpoint, model: Any) -> None:
    found = {t.name: t for shard in checkpoint.shards for t in shard if _BLOCK not in t.name}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _compare(checkpoint.folder, found, expected, "the base model", model.all_tied_weights_keys)


def _compare(
    folder: Path,
    found: dict[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
    of: str,
    may_lack: dict[str, str],
) -> None:
    """Complain about the first missing, unknown or misshaped tensor, with the number of its kind."""
    missing = sorted(expected.keys() - found.keys() - may_lack.keys())
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
        if tensor.shape != expected[name] and not (name.endswith(".gate_alpha") and tensor.shape == ()):
            raise ConversionError(f"{folder}: {name} has shape {tensor.shape}; config.json asks for {expected[name]}.")


def _check_target(source: Path, target: Path, overwrite: bool, size: int) -> None:
    where, resolved = source.resolve(), target.resolve()
    if resolved == where or resolved in where.parents:
        raise ConversionError(f"OUT ({target}) is SRC ({source}) or holds it. Name another folder for OUT.")
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise ConversionError(f"{target} exists. Name another OUT, or give --overwrite to replace it.")
        if not target.is_dir() or {p.name for p in target.iterdir()} - {BASE, ADAPTER}:
            raise ConversionError(
                f"{target} is not the result of an earlier conversion (a folder with {BASE} and {ADAPTER} in it and "
                "nothing else), so it is not overwritten. Name another OUT."
            )
    there = next(parent for parent in resolved.parents if parent.exists())
    if not there.is_dir():
        raise ConversionError(f"{target} cannot be made: {there} is a file.")
    free, needed = shutil.disk_usage(there).free, size + _SPARE
    if free < needed:
        raise ConversionError(
            f"{there} has {free / 1e9:.2f} GB free; the converted checkpoint needs {needed / 1e9:.2f} GB. "
            "Free some room, or name an OUT on another disk."
        )


def _check_finite(plan: _Plan, told: Progress) -> None:
    tensors = [*plan.block_tensors.values(), *(t for shard in plan.shards for t in shard)]
    count = _Counter("Checking", plan.size, told)
    for tensor in tensors:
        bad = tensor.count_not_finite(count)
        if bad:
            raise ConversionError(
                f"{tensor.file}: {bad} of {torch.Size(tensor.shape).numel()} values of {tensor.name} are NaN or "
                "infinite. The training run that wrote it diverged, or the file is damaged; use another checkpoint."
            )


# --- writing ------------------------------------------------------------


class _Counter:
    """Adds up bytes and tells the caller of `convert`."""

    def __init__(self, task: str, total: int, told: Progress):
        self.task, self.done, self.total, self.told = task, 0, total, told
        told(task, 0, total)

    def __call__(self, size: int) -> None:
        self.done += size
        self.told(self.task, self.done, self.total)


def _write_base(plan: _Plan, folder: Path, told: Progress) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", plan.config)
    _copy_side_files(plan.source, folder)
    count = _Counter("Writing", sum(t.size for shard in plan.shards for t in shard), told)
    if len(plan.shards) == 1:
        copy_tensors(plan.shards[0], folder / SINGLE, count)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan.shards, 1):
        name = f"model-{number:05}-of-{len(plan.shards):05}.safetensors"
        copy_tensors(shard, folder / name, count)
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    _write_json(folder / INDEX, {"metadata": {"total_size": count.total}, "weight_map": weight_map})


def _copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, processor, chat templates, licence: everything small that is neither code nor weights."""
    for file in sorted(source.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        if file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, folder / file.name, ignore=lambda d, names: [n for n in names if n.endswith(".py")])
        if not file.is_file() or file.name.startswith(".") or file.name in _NOT_COPIED:
            continue
        if not licence and (file.suffix not in _COPIED or file.name.endswith(".index.json")):
            continue
        settings = _settings_naming_code(file)
        if settings is None:
            shutil.copyfile(file, folder / file.name)
        else:
            _write_json(folder / file.name, settings)


def _settings_naming_code(file: Path) -> dict[str, Any] | None:
    """A processor's or tokenizer's settings without their reference to custom code; None if they have none."""
    if not file.name.endswith("config.json"):
        return None
    settings = read_json(file, "it was there a moment ago")
    if "auto_map" not in settings:
        return None
    del settings["auto_map"]
    if "processor_class" in settings:
        settings["processor_class"] = "Qwen3VLProcessor"
    return settings


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_adapter(plan: _Plan, folder: Path) -> None:
    folder.mkdir()
    tensors = [replace(stored, name=name, shape=plan.block_shapes[name]) for name, stored in plan.block_tensors.items()]
    copy_tensors(tensors, folder / WEIGHTS)
    plan.adapter_config.save_pretrained(str(folder))
