"""Checkpoints of the PVM authors' fork of Qwen3-VL, taken apart into a plain base model and a PVM adapter.

In: a folder as `authors.py` describes it. Out: `base`, which plain transformers loads, and `adapter`, which
`keepsight.load` loads with it. Base tensors are copied byte for byte, a few MB at a time.

The adapter follows the published rule (`causal=False`): text before an image retrieves from it too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from keepsight.checkpoints.adapters import WEIGHTS, inspect_adapter
from keepsight.checkpoints.atomic import check_target, new_folder, write_json
from keepsight.checkpoints.authors import ADAPTER, BASE, ConversionError, Plan, plan_conversion
from keepsight.checkpoints.shards import INDEX, SINGLE, copy_tensors, read_json, side_files

_SPARE = 16 * 2**20  # bytes on top of the weights that must be free: headers, tokenizer and processor

#: Called with (what is being done, bytes done so far, bytes in all).
Progress = Callable[[str, int, int], object]


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
    plan = plan_conversion(source)
    _check_target(source, target, overwrite, plan.size)
    _check_finite(plan, told)
    with new_folder(target) as folder:
        _write_base(plan, source, folder / BASE, told)
        _write_adapter(plan, folder / ADAPTER)
        info = inspect_adapter(folder / ADAPTER)
    return Conversion(
        base=target / BASE,
        adapter=target / ADAPTER,
        base_tensors=sum(map(len, plan.shards)),
        base_bytes=plan.base_size,
        adapter_parameters=info.num_parameters,
        gates=info.gates,
    )


def _check_target(source: Path, target: Path, overwrite: bool, size: int) -> None:
    where, resolved = source.resolve(), target.resolve()
    if resolved == where or resolved in where.parents:
        raise ConversionError(f"OUT ({target}) is SRC ({source}) or holds it. Name another folder for OUT.")
    foreign = None
    if not target.is_dir() or {p.name for p in target.iterdir()} - {BASE, ADAPTER}:
        foreign = f"the result of an earlier conversion (a folder with {BASE} and {ADAPTER} in it and nothing else)"
    there = check_target(target, overwrite, foreign, ConversionError)
    free, needed = shutil.disk_usage(there).free, size + _SPARE
    if free < needed:
        raise ConversionError(
            f"{there} has {free / 1e9:.2f} GB free; the converted checkpoint needs {needed / 1e9:.2f} GB. "
            "Free some room, or name an OUT on another disk."
        )


def _check_finite(plan: Plan, told: Progress) -> None:
    tensors = [*plan.block_tensors.values(), *(t for shard in plan.shards for t in shard)]
    count = _Counter("Checking", plan.size, told)
    for tensor in tensors:
        bad = tensor.count_not_finite(count)
        if bad:
            raise ConversionError(
                f"{tensor.file}: {bad} of {torch.Size(tensor.shape).numel()} values of {tensor.name} are NaN or "
                "infinite. The training run that wrote it diverged, or the file is damaged; use another checkpoint."
            )


class _Counter:
    """Adds up bytes and tells the caller of `convert`."""

    def __init__(self, task: str, total: int, told: Progress):
        self.task, self.done, self.total, self.told = task, 0, total, told
        told(task, 0, total)

    def __call__(self, size: int) -> None:
        self.done += size
        self.told(self.task, self.done, self.total)


def _write_base(plan: Plan, source: Path, folder: Path, told: Progress) -> None:
    folder.mkdir()
    write_json(folder / "config.json", plan.config)
    _copy_side_files(source, folder)
    count = _Counter("Writing", plan.base_size, told)
    if len(plan.shards) == 1:
        copy_tensors(plan.shards[0], folder / SINGLE, count)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan.shards, 1):
        name = f"model-{number:05}-of-{len(plan.shards):05}.safetensors"
        copy_tensors(shard, folder / name, count)
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    write_json(folder / INDEX, {"metadata": {"total_size": count.total}, "weight_map": weight_map})


def _copy_side_files(source: Path, folder: Path) -> None:
    """Tokenizer, processor, chat templates, licence; settings without their reference to the fork's code."""
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        shutil.copytree(source / templates, folder / templates, ignore=shutil.ignore_patterns("*.py"))
    for file in side_files(source):
        settings = read_json(file, "it was there a moment ago") if file.name.endswith("config.json") else {}
        if settings.pop("auto_map", None) is None:
            shutil.copyfile(file, folder / file.name)
            continue
        if "processor_class" in settings:
            settings["processor_class"] = "Qwen3VLProcessor"
        write_json(folder / file.name, settings)


def _write_adapter(plan: Plan, folder: Path) -> None:
    folder.mkdir()
    tensors = [replace(stored, name=name, shape=plan.block_shapes[name]) for name, stored in plan.block_tensors.items()]
    copy_tensors(tensors, folder / WEIGHTS)
    plan.adapter_config.save_pretrained(str(folder))
