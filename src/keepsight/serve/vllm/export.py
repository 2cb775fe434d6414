"""The folder that vLLM serves: the base model's files, the memory's weights beside them, and our architecture's name.

    config.json                        the base's, with our architecture and the memory's configuration
    model*.safetensors                 the base's, linked (or copied)
    keepsight_memory.safetensors       the memory's tensors, under names in the base's scheme
    model.safetensors.index.json       names both
    tokenizer, processor, templates    copied

vLLM without keepsight refuses the folder, because it does not know the architecture: a memory is never lost silently.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download

from keepsight.checkpoints.adapters import WEIGHTS, AdapterInfo, has_processor
from keepsight.checkpoints.atomic import check_target, new_folder, write_json
from keepsight.checkpoints.bases import check_weights
from keepsight.checkpoints.shards import (
    INDEX,
    SIDE,
    StoredTensor,
    copy_tensors,
    read_header,
    read_json,
    side_files,
    weight_files,
)
from keepsight.checkpoints.sources import check_sources
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.loading import STORED_PREFIX
from keepsight.peft_method import config_from_adapter
from keepsight.pvm.config import PvmConfig
from keepsight.serve.vllm.names import CONFIG_KEY, MEMORY_FILE, SERVED, ServedFamily
from keepsight.shipped import resolve_base

#: How the base's weights come into the export.
Weights = Literal["link", "copy"]

_NON_CAUSAL = (
    "This memory was trained with the published, non-causal rule (causal=false): text before an image reads that image "
    "too. An engine that shares prefixes, splits prompts into chunks and continues conversations computes a position's "
    "state before it has seen the later images, so it cannot follow that rule."
)


class ExportError(KeepsightError):
    """The adapter cannot be served by vLLM, or the folder cannot be made; nothing was written."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: the folder to serve.
        architecture: the name that vLLM finds in its config.json.
        family: what people call the family.
        linked: whether the base's weights are links.
        base_bytes: bytes of the base's weights.
        memory_bytes: bytes of the memory's weights.
        loras: adapters that were not written but can be served beside it.
    """

    folder: Path
    architecture: str
    family: str
    linked: bool
    base_bytes: int
    memory_bytes: int
    loras: tuple[Path, ...]


def export_vllm(
    adapter: str | Path,
    target: str | Path,
    *,
    more: Sequence[str | Path] = (),
    base: str | Path | None = None,
    weights: Weights = "link",
    overwrite: bool = False,
    allow_noncausal: bool = False,
) -> Export:
    """Make a folder that `vllm serve` takes, from a PVM adapter and its base.

    Everything is checked before anything is written; the folder appears in one step or not at all.

    Args:
        adapter: the PVM adapter, a folder or a hub id.
        target: folder to make.
        more: LoRA adapters of the same base that shall be served beside it; checked, not written.
        base: the base model, where the recorded one is somewhere else.
        weights: "link" (the base must stay where it is) or "copy".
        overwrite: replace `target` if it is an earlier export.
        allow_noncausal: serve a memory of the published rule by the causal rule, which changes its answers.

    Raises:
        ExportError: if vLLM cannot serve this adapter, or `target` exists.
        KeepsightError, FileNotFoundError: if the adapter or its base is missing, damaged, or does not fit.
    """
    target = Path(target).expanduser()
    base_name, adapters = check_sources(adapter, more, base)
    memory, loras = _split(adapter, adapters)
    config = config_from_adapter(PvmConfig, memory.config)
    served = _check_servable(config, memory, allow_noncausal)
    refuse_embedding(memory)
    foreign = None if (target / MEMORY_FILE).is_file() else f"an earlier export (it holds no {MEMORY_FILE})"
    check_target(target, overwrite, foreign, ExportError)
    source = base_folder(base_name)
    described = read_json(source / "config.json", "a checkpoint folder has a config.json beside its weights")
    described = describe(described, config, served)
    size = sum(file.stat().st_size for file in weight_files(source))
    stored = [tensor for tensor in read_header(memory.path / WEIGHTS) if ".pvm_blocks." in tensor.name]
    tensors = [replace(tensor, name=tensor.name.removeprefix(STORED_PREFIX)) for tensor in stored]
    write_folder(target, source, memory.path, described, tensors, MEMORY_FILE, weights)
    return Export(
        folder=target,
        architecture=served.architecture,
        family=served.name,
        linked=weights == "link",
        base_bytes=size,
        memory_bytes=sum(t.size for t in tensors),
        loras=tuple(lora.path for lora in loras),
    )


def write_folder(
    target: Path,
    source: Path,
    adapter: Path,
    described: dict[str, Any],
    tensors: Sequence[StoredTensor],
    name: str,
    weights: Weights = "link",
) -> None:
    """Write the folder that vLLM serves, whole or not at all.

    Args:
        target: the folder.
        source: the base's.
        adapter: the adapter's, whose processor goes before the base's.
        described: content of config.json.
        tensors: what the base has not.
        name: file for them.
        weights: the base's, linked or copied.
    """
    files = weight_files(source)
    with new_folder(target) as folder:
        _copy_side_files(source, adapter, folder)
        copy_tensors(tensors, folder / name)
        index = {tensor.name: file.name for file in files for tensor in read_header(file)}
        index |= dict.fromkeys((tensor.name for tensor in tensors), name)
        total = sum(t.size for t in tensors) + sum(file.stat().st_size for file in files)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        write_json(folder / "config.json", described)
        for file in files:
            if weights == "copy":
                shutil.copyfile(file, folder / file.name)
            else:
                os.symlink(file.resolve(), folder / file.name)


def _split(source: str | Path, adapters: list[AdapterInfo]) -> tuple[AdapterInfo, list[AdapterInfo]]:
    """The one PVM, and the LoRAs."""
    vismem = [info for info in adapters if info.method == "VISMEM"]
    if vismem:
        raise ExportError(
            f"{vismem[0].path} is a VisMem. It forms its memories while it writes, by a model of its own that runs "
            "beside the decoder, which vLLM has no place for. Serve it with: keepsight serve ADAPTER (or, as an "
            "experiment, with vLLM inside: keepsight serve ADAPTER --engine vllm)."
        )
    memories = [info for info in adapters if info.method == "PVM"]
    if len(memories) != 1:
        found = ", ".join(f"{info.path} ({info.method})" for info in adapters) or f"{source}, a plain model"
        raise ExportError(
            f"An export needs exactly one PVM adapter; given: {found}. A plain model, or a LoRA alone, needs no "
            "export: vLLM serves it as it is."
        )
    others = [info for info in adapters if info.method not in ("PVM", "LORA")]
    if others:
        raise ExportError(f"{others[0].path} is a {others[0].method} adapter; beside a memory vLLM serves LoRA only.")
    return memories[0], [info for info in adapters if info.method == "LORA"]


def _check_servable(config: PvmConfig, memory: AdapterInfo, allow_noncausal: bool) -> ServedFamily:
    if config.branch == "mlp":
        raise ExportError(
            f"{memory.path} is the iso-parameter control (branch='mlp'), which has no memory: a tool of comparisons, "
            "not of serving. Compare with: keepsight generate."
        )
    served = SERVED.get(str(config.base_model_type))
    if served is None:
        known = ", ".join(f"{served.name} ({model_type})" for model_type, served in SERVED.items())
        raise ExportError(
            f"{memory.path} belongs to a base of model_type {config.base_model_type!r}, which the vLLM plugin does not "
            f"serve. Served: {known}. keepsight serve takes every family."
        )
    if not config.causal:
        if not allow_noncausal:
            raise ExportError(
                f"{memory.path}: {_NON_CAUSAL} Serve it on the Hugging Face path (keepsight serve), train one with "
                "causal=true, or accept the deviation with --allow-noncausal: text after its images is served as "
                "trained; text before them (a system prompt) is served without memory, which can change all that "
                "follows."
            )
        warnings.warn(
            f"{_NON_CAUSAL} It is exported to be served by the causal rule: text before an image gets no memory of it. "
            "Where an image comes first, little differs; with a system prompt before the image, answers can differ in "
            "most of their tokens from those of keepsight.load. Measure yours before you rely on it.",
            KeepsightWarning,
            stacklevel=3,
        )
    return served


def base_folder(base: str) -> Path:
    """Where the base's files are; a hub id is fetched, or found in the cache.

    Raises:
        KeepsightError: if its weights are not whole, or not finite. Each value is read: vLLM would not say.
    """
    folder = Path(resolve_base(base)).expanduser()
    if not folder.is_dir():
        fetched = ["*.safetensors", f"*{INDEX}", *(f"*{end}" for end in SIDE)]
        folder = Path(snapshot_download(base, allow_patterns=fetched))
    check_weights(folder, throughout=True)
    return folder.resolve()


def refuse_embedding(adapter: AdapterInfo) -> None:
    """Raise if an adapter brings an embedding, which the folder, with the base's files in it, has no place for."""
    if adapter.embedding_rows is not None:
        raise ExportError(
            f"{adapter.path} brings an embedding of its own ({adapter.embedding_rows} rows, save_embedding_layers), "
            "and vLLM would read the base's. Put it into the base: model, processor = keepsight.load(ADAPTER), "
            "save the memory and the processor without it (save_embedding_layers=False), then the base with it "
            "(model.unload().save_pretrained(FOLDER)), and export the memory with --base FOLDER."
        )


def describe(base: dict[str, Any], config: PvmConfig, served: ServedFamily) -> dict[str, Any]:
    """The export's config.json: the base's, with our architecture and what serving must know of the memory.

    Args:
        base: content of the base's config.json.
        config: the memory's, resolved.
        served: the family.
    """
    wanted = ["layers", "width", "ffn_width", "head_dim", "num_kv_heads", "attention_bias", "eps", "causal", "branch"]
    wanted += ["base_model_type", "base_num_layers", "base_hidden_size"]
    memory = {name: value for name, value in config.to_dict().items() if name in wanted}
    plain = {name: value for name, value in base.items() if name != "auto_map"}
    return plain | {"architectures": [served.architecture], CONFIG_KEY: memory}


def _copy_side_files(source: Path, adapter: Path, folder: Path) -> None:
    """Tokenizer, processor, templates, licence: the base's, or the adapter's where it brings a processor of its own."""
    for origin in (source, adapter) if has_processor(adapter) else (source,):
        for file in side_files(origin):
            shutil.copyfile(file, folder / file.name)
