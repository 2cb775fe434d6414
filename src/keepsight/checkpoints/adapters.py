"""What stands in an adapter folder, read and checked without loading any model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from keepsight.errors import BrokenAdapterError
from keepsight.peft_method import config_from_adapter
from keepsight.shipped import resolve_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter folder, checked.

    Attributes:
        path: the folder.
        method: PEFT's name of the method, e.g. "PVM" or "LORA".
        base: name or path of the base model, as recorded.
        config: the whole adapter_config.json.
        shapes: tensor name -> shape.
        dtypes: the dtypes that occur.
        gates: PVM only: decoder layer -> value of its gate.
    """

    path: Path
    method: str
    base: str | None
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtypes: tuple[str, ...]
    gates: dict[int, float]

    @property
    def num_parameters(self) -> int:
        """Parameters stored in the adapter."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


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
    shapes, dtypes, gates = _read_weights(path / WEIGHTS)
    info = AdapterInfo(path, config["peft_type"], config.get("base_model_name_or_path"), config, shapes, dtypes, gates)
    if info.method == "PVM":
        _check_pvm_tensors(info)
    return info


def _read_weights(file: Path) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], dict[int, float]]:
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: set[str] = set()
    gates: dict[int, float] = {}
    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
                if not torch.isfinite(tensor).all():
                    bad = int((~torch.isfinite(tensor)).sum())
                    raise BrokenAdapterError(
                        f"{file}: {bad} of {tensor.numel()} values of {name} are NaN or infinite. The training run "
                        "that wrote it diverged; use an earlier checkpoint or train with a lower learning rate."
                    )
                if name.endswith("pvm_blocks.gate"):
                    gates[_layer_of(name)] = tensor.float().item()
    except SafetensorError as error:
        raise BrokenAdapterError(
            f"{file} is not a whole safetensors file ({error}). It was probably cut off while being written or "
            f"copied ({file.stat().st_size} bytes are there); copy it again or use an earlier checkpoint."
        ) from error
    return shapes, tuple(sorted(dtypes)), dict(sorted(gates.items()))


def _layer_of(name: str) -> int:
    return int(name.partition(".layers.")[2].partition(".")[0])


def _check_pvm_tensors(info: AdapterInfo) -> None:
    from keepsight.pvm.config import PvmConfig
    from keepsight.pvm.tuner import make_block

    config = config_from_adapter(PvmConfig, info.config)
    if config.base_hidden_size is None:
        raise BrokenAdapterError(
            f"{info.path / CONFIG} does not say which base the memory was made for; only adapters saved by "
            "save_pretrained can be loaded."
        )
    with torch.device("meta"):
        block = make_block(config)
    expected = {
        (layer, name): tuple(tensor.shape)
        for layer in config.layers or ()
        for name, tensor in block.state_dict().items()
    }
    found = {
        (_layer_of(name), name.partition(".pvm_blocks.")[2]): shape
        for name, shape in info.shapes.items()
        if ".pvm_blocks." in name
    }
    for (layer, name), shape in expected.items():
        if (layer, name) not in found:
            raise BrokenAdapterError(f"{info.path / WEIGHTS} lacks {name} of the block at layer {layer}.")
        if found[layer, name] != shape:
            raise BrokenAdapterError(
                f"{info.path / WEIGHTS}: {name} at layer {layer} has shape {found[layer, name]}; "
                f"{CONFIG} describes {shape}. The two files belong to different adapters."
            )
    extra = found.keys() - expected.keys()
    if extra:
        raise BrokenAdapterError(
            f"{info.path / WEIGHTS} holds tensors that {CONFIG} does not describe, such as {sorted(extra)[0]}. "
            "The two files belong to different adapters."
        )
