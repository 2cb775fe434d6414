"""What stands in an adapter folder, read and checked without loading any model."""

from __future__ import annotations

import contextlib
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import PeftType
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from keepsight.backbone import Backbone, family_of
from keepsight.checkpoints.bases import meta_model
from keepsight.checkpoints.shards import not_whole
from keepsight.errors import BrokenAdapterError
from keepsight.loading import STORED_PREFIX, check_finite, check_tensors, is_embedding
from keepsight.peft_method import config_from_adapter
from keepsight.pvm import PvmConfig
from keepsight.shipped import resolve_adapter
from keepsight.vismem import VisMemConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: PEFT's name of a memory's method -> its config.
MEMORIES: dict[str, Any] = {"PVM": PvmConfig, "VISMEM": VisMemConfig}


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter folder, checked.

    Attributes:
        path: the folder.
        method: PEFT's name of the method, e.g. "PVM" or "LORA".
        base: name or path of the base model, as recorded.
        config: the whole adapter_config.json.
        tensors: what is stored: name -> tensor, on the meta device.
        gates: PVM only: decoder layer -> value of its gate.
    """

    path: Path
    method: str
    base: str | None
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)
    gates: dict[int, float]

    @property
    def num_parameters(self) -> int:
        """Parameters stored in the adapter."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that occur."""
        return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}))

    @property
    def embedding_rows(self) -> int | None:
        """Rows of the base's embedding, where the adapter brings it (`save_embedding_layers=True`)."""
        return next((len(tensor) for name, tensor in self.tensors.items() if is_embedding(name)), None)


def find_adapter(source: str | Path, revision: str | None = None) -> Path | None:
    """The local folder of an adapter, downloading it if `source` is a hub id; None if `source` is no adapter."""
    path = Path(resolve_adapter(source)).expanduser()
    if path.exists():
        return path if (path / CONFIG).is_file() else None
    try:
        found = Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.json", "*.jinja", WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, OSError):
        return None
    return found if (found / CONFIG).is_file() else None


def inspect_adapter(path: str | Path) -> AdapterInfo:
    """Read an adapter folder and check all that can be checked without its base.

    Raises:
        BrokenAdapterError: if files are missing, truncated, not JSON, or hold NaN or infinite values, or if a PVM
            adapter's tensors are not those its own configuration describes.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise BrokenAdapterError(
                f"{path} holds no {name}. An adapter folder, as save_pretrained writes it, has {CONFIG} and {WEIGHTS}"
                + (" (pickled .bin weights are never read)." if name == WEIGHTS else ".")
            )
    try:
        config = json.loads((path / CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BrokenAdapterError(f"{path / CONFIG} is not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise BrokenAdapterError(f"{path / CONFIG} names no peft_type, so it does not describe a PEFT adapter.")
    method = config["peft_type"]
    if not isinstance(method, str) or method not in PeftType.__members__:
        raise BrokenAdapterError(
            f"{path / CONFIG}: peft_type {method!r} is no method of the PEFT that is installed, nor of keepsight (PVM, "
            "VISMEM). Correct the name, or install the PEFT release that wrote the adapter."
        )
    tensors, gates = _read_weights(path / WEIGHTS)
    info = AdapterInfo(path, method, config.get("base_model_name_or_path"), config, tensors, gates)
    _check_method(info)
    if method in MEMORIES:
        _check_memory(info)
    whole = [name for name, tensor in tensors.items() if method == "LORA" and not tensor.is_floating_point()]
    if whole:
        raise BrokenAdapterError(
            f"{path / WEIGHTS}: {whole[0]} is stored as {tensors[whole[0]].dtype}; expected are numbers with "
            "fractions, of 16 or 32 bits. Write it with save_pretrained."
        )
    return info


def _check_method(info: AdapterInfo) -> None:
    """Refuse tensors of another method than the configuration names."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from keepsight.pvm.tuner import PvmModel
    from keepsight.vismem.tuner import VisMemModel

    marks = {"PVM": f".{PvmModel.container}.", "VISMEM": f".{VisMemModel.container}."}
    for method, mark in marks.items():
        theirs = sorted(name for name in info.tensors if mark in name)
        if theirs and method != info.method:
            raise BrokenAdapterError(
                f"{info.path / CONFIG} names the method {info.method}, and {info.path / WEIGHTS} holds tensors of "
                f"{method}: {theirs[0]}. The two belong to different adapters: copy both again."
            )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType[info.method])
    if prefix and info.method not in MEMORIES and not any(prefix in name for name in info.tensors):
        example = min(info.tensors, default="nothing")
        raise BrokenAdapterError(
            f"{info.path / CONFIG} names the method {info.method}, and {info.path / WEIGHTS} holds no tensor of it: "
            f"stored is, for example, {example}; expected is a name with {prefix}. The two belong to different "
            "adapters: copy both again."
        )


def _read_weights(file: Path) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    stored: dict[str, torch.Tensor] = {}
    gates: dict[int, float] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name)
                stored[name] = torch.empty_like(tensor, device="meta")
                check_finite(name, tensor, str(file))
                layer = name.partition(".layers.")[2].partition(".")[0]
                if name.endswith("pvm_blocks.gate") and layer.isdecimal() and tensor.numel() == 1:
                    gates[int(layer)] = tensor.float().item()
    except SafetensorError as error:
        raise BrokenAdapterError(not_whole(file, error)) from error
    return stored, dict(sorted(gates.items()))


def _check_memory(info: AdapterInfo) -> None:
    """All that a memory's own configuration tells of its tensors: a PVM's in full, where a VisMem's stand."""
    from keepsight.pvm.branch import BRANCH as PVM_BRANCH
    from keepsight.pvm.branch import make_block
    from keepsight.pvm.tuner import PvmModel
    from keepsight.vismem.branch import BRANCH as VISMEM_BRANCH
    from keepsight.vismem.tuner import VisMemModel

    try:
        config = config_from_adapter(MEMORIES[info.method], info.config)
    except (ValueError, TypeError) as error:
        raise BrokenAdapterError(f"{info.path / CONFIG}: {error}") from error
    if config.base_hidden_size is None or config.base_model_type is None:
        raise BrokenAdapterError(
            f"{info.path / CONFIG} does not say which base the memory was made for; only adapters saved by "
            "save_pretrained can be loaded."
        )
    decoder = STORED_PREFIX + decoder_path(config.base_model_type)
    embeddings = {name: tensor for name, tensor in info.tensors.items() if is_embedding(name)}
    if info.method == "VISMEM":
        place = f"{decoder}.{VISMEM_BRANCH}.{VisMemModel.container}."
        wrong = sorted(name for name in info.tensors.keys() - embeddings.keys() if not name.startswith(place))
        if wrong:
            raise BrokenAdapterError(
                f"{info.path / WEIGHTS} holds {len(wrong)} tensors that are not the memory's. Stored is, for example, "
                f"{wrong[0]}; expected is {place}*. Names change when a file is written from a wrapped model (module.) "
                "or without PEFT (no base_model.model.): write it with save_pretrained."
            )
        return
    with torch.device("meta"):
        block = make_block(config)
    expected = {
        f"{decoder}.layers.{layer}.{PVM_BRANCH}.{PvmModel.container}.{name}": tensor
        for layer in config.layers or ()
        for name, tensor in block.state_dict().items()
    }
    check_tensors(info.tensors, expected | embeddings, str(info.path / WEIGHTS))


@functools.cache
def decoder_path(model_type: str) -> str:
    """Where the decoder stands in a family's models, found without any model: "model.language_model".

    Raises:
        UnsupportedModelError: if keepsight does not know the family.
    """
    family_of(SimpleNamespace(model_type=model_type), "The memory's base")
    return Backbone.of(meta_model(AutoConfig.for_model(model_type))).decoder_path


def has_processor(folder: Path) -> bool:
    """Whether a processor was saved there."""
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    return any((folder / name).is_file() for name in names)


def trained_steps(folder: Path) -> int | None:
    """Optimiser steps that an adapter was trained for, as its trainer left it in this folder or its last checkpoint."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    for place in (folder, *sorted(checkpoints, key=lambda path: int(path.name[11:]), reverse=True)):
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
            state = json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))
            return int(state["global_step"] if "global_step" in state else state["progress"]["step"])
    return None
