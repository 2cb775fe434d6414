"""Checkpoint folders as bytes: which tensors stand where, are they finite, and a copy of some of them.

Tensors are never decoded to be copied, so a copy is byte-identical in every dtype, and a checkpoint of any size passes
through a buffer of a few MB.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from keepsight.errors import KeepsightError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FIRST = 4096  # values that are looked at where not all are
BUFFER = 16 * 2**20  # bytes; a multiple of every item size
SIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NOT_SIDE = (".", "adapter", "trainer_state", "training")
_CHECKED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Called with the number of bytes just done.
Advance = Callable[[int], object]


class CheckpointError(KeepsightError):
    """Files of a checkpoint folder are missing or damaged."""


def not_whole(file: Path, error: Exception) -> str:
    """What to say of a file that safetensors does not read."""
    return (
        f"{file} is not a whole safetensors file ({error}): it is cut off or damaged ({file.stat().st_size:,} bytes "
        "are there). Copy it again, or use an earlier checkpoint."
    )


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor stands.

    Attributes:
        name: its name in the checkpoint.
        file: the safetensors file.
        dtype: safetensors' name of the dtype, e.g. "BF16".
        shape: its shape.
        start: position of its first byte in the file.
        size: bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, at most `BUFFER` at a time."""
        with open(self.file, "rb") as source:
            source.seek(self.start)
            left = self.size
            while left:
                data = source.read(min(BUFFER, left))
                if not data:
                    raise OSError(f"{self.file} ended inside {self.name}: it was cut off while being read.")
                left -= len(data)
                yield data

    def begins_finite(self) -> bool:
        """Whether its first values are numbers (asked of floats of 16 bits and more): a tensor that is lost throughout
        is found without being read."""
        dtype = _CHECKED.get(self.dtype)
        if dtype is None or not self.size:
            return True
        with open(self.file, "rb") as source:
            source.seek(self.start)
            data = source.read(min(_FIRST * dtype.itemsize, self.size))
        return bool(torch.isfinite(torch.frombuffer(bytearray(data), dtype=dtype)).all())

    def count_not_finite(self, advance: Advance = lambda done: None) -> int:
        """How many values are NaN or infinite (0 for integers and 8-bit floats, which are not looked at)."""
        dtype, bad = _CHECKED.get(self.dtype), 0
        for data in self.chunks():
            if dtype is not None:
                bad += int((~torch.isfinite(torch.frombuffer(bytearray(data), dtype=dtype))).sum())
            advance(len(data))
        return bad


def read_json(file: Path, lesson: str) -> dict[str, Any]:
    """The JSON object in `file`; `lesson` says in the error why it is needed.

    Raises:
        CheckpointError: if there is no such file, or something else in it.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: {lesson}.")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {type(value).__name__}, not a JSON object: {lesson}.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, as transformers chooses them: one file, else the index.

    Raises:
        CheckpointError: if there are none, only pickled ones, or the index does not match the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickled = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*model*.{suffix}"))
        loose = sorted(p.name for p in folder.glob("*.safetensors"))
        if loose:
            raise CheckpointError(f"{folder} holds {loose[0]} but no {INDEX} that says which shards there are.")
        if pickled:
            raise CheckpointError(
                f"{folder} holds pickled weights only ({pickled[0]}). Pickle can run any code when it is read, so "
                "keepsight never reads it. Save the checkpoint as safetensors (save_pretrained with transformers 5 "
                "does) where you trust it, then convert that."
            )
        raise CheckpointError(f"{folder} holds no weights: {SINGLE}, or shards with {INDEX}, are missing.")
    index = read_json(folder / INDEX, "the index names the shards")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map, so it does not say which shards there are.")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} names {name!r}, which is no safetensors file of this folder.")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / INDEX} names {name}, which is not there. Copy the missing shard.")
    return [folder / name for name in names]


def side_files(folder: Path) -> list[Path]:
    """The small files of a model's or adapter's folder that go wherever it goes: tokenizer, processor, chat templates,
    licence; neither code nor weights, nor what describes the model or its training."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(_NOT_SIDE)]
    kept = [f for f in files if f.suffix in SIDE and f.name != "config.json" and not f.name.endswith(".index.json")]
    return [file for file in files if file in kept or file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))]


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in file order.

    Raises:
        CheckpointError: if the file is truncated or no safetensors file.
    """
    try:
        with safe_open(file, "pt"):  # checks offsets, sizes and the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(not_whole(file, error)) from error
    with open(file, "rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header = json.loads(source.read(length))
    header.pop("__metadata__", None)
    tensors = [
        StoredTensor(
            name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, entry["data_offsets"][1] - begin
        )
        for name, entry in header.items()
        for begin in [entry["data_offsets"][0]]
    ]
    return sorted(tensors, key=lambda tensor: tensor.start)


def copy_tensors(tensors: Iterable[StoredTensor], file: Path, advance: Advance = lambda done: None) -> None:
    """Write `tensors` to a new safetensors file, byte for byte, in a few MB of memory."""
    # Wide items first, as safetensors itself writes them: every tensor then starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda t: (-_item_size(t), t.start))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in ordered:
            for data in tensor.chunks():
                out.write(data)
                advance(len(data))


def _item_size(tensor: StoredTensor) -> int:
    return tensor.size // max(1, torch.Size(tensor.shape).numel())
