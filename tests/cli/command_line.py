"""What tests of the command line share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from keepsight.cli import app
from keepsight.train.pvm.sft import TrainReport

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Trained = tuple[Path, TrainReport]


def keepsight_cli(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})


def message(result: Result) -> str:
    """The one error message of a failed command; fails if there is more or less than that."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    return result.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoiled(adapter: Path, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / "spoiled"
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    if how == "truncated":
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    elif how == "not finite":
        tensors = load_file(copy / WEIGHTS)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, copy / WEIGHTS)
    elif how == "no weights":
        (copy / WEIGHTS).unlink()
    elif how == "no config":
        (copy / CONFIG).unlink()
    elif how == "bad json":
        (copy / CONFIG).write_text("{")
    else:
        config = json.loads((copy / CONFIG).read_text())
        config |= {"base_hidden_size": 4096} if how == "other base" else {"base_model_name_or_path": "/gone/model"}
        (copy / CONFIG).write_text(json.dumps(config))
    return copy


def corrupt(image: Path, how: str) -> Path:
    if how == "missing":
        image.unlink()
    elif how == "no image":
        image.write_text("hello")
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:-30])
    elif how == "folder":
        image.unlink()
        image.mkdir()
    return image
