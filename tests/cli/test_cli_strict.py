"""Damage times command: no command goes on with a base or an adapter that would be partly random."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Trained, keepsight_cli, message
from damage import ADAPTER, BASE, spoil

#: Command -> its words for (source, image, data, folder to write).
COMMANDS: dict[str, Any] = {
    "generate": lambda source, image, data, out: ["generate", source, "-i", image, "-p", "read"],
    "diagnose": lambda source, image, data, out: ["diagnose", source, "-i", image, "-p", "read", "-o", image.parent],
    "serve": lambda source, image, data, out: ["serve", source, "--port", 0],
    "export": lambda source, image, data, out: ["export", "vllm", source, out],
    "grpo": lambda source, image, data, out: ["train", "pvm-grpo", source, "-d", data, "-o", out],
}
TRAINING: dict[str, Any] = {
    "pvm": lambda base, data, out: ["train", "pvm", base, "-d", data, "-o", out],
    "vismem": lambda base, data, out: ["train", "vismem-formation", base, "-d", data, "-o", out],
}


@pytest.mark.parametrize("damage", ADAPTER)
@pytest.mark.usefixtures("no_loading")
def test_an_adapter(damage: str, trained: Trained, image: Path, data: Path, tmp_path: Path) -> None:
    folder = spoil(trained[0], tmp_path / "memory", ADAPTER[damage])
    said = {message(keepsight_cli("info", folder))}
    for words in COMMANDS.values():
        said.add(message(keepsight_cli(*words(folder, image, data, tmp_path / "out"))))
    assert len(said) == 1  # all say the same
    assert "base_model.model." in said.pop()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", BASE)
@pytest.mark.usefixtures("no_loading")
def test_a_base(damage: str, trained: Trained, tiny_vlm: Path, image: Path, data: Path, tmp_path: Path) -> None:
    base = spoil(tiny_vlm, tmp_path / "base", BASE[damage])
    memory = tmp_path / "memory"
    shutil.copytree(trained[0], memory, ignore=shutil.ignore_patterns("checkpoint-*"))
    file = memory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    calls = [words(memory, image, data, tmp_path / "out") for words in COMMANDS.values()]
    calls += [words(base, data, tmp_path / "out") for words in TRAINING.values()]
    calls.append(COMMANDS["generate"](base, image, data, tmp_path / "out"))
    for words in calls:
        assert "does not hold the weights of its model" in message(keepsight_cli(*words))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_loading")
def test_an_unknown_method(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained[0], tmp_path / "memory", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "memory" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "PVN"}))
    assert "peft_type 'PVN' is no method" in message(keepsight_cli("info", tmp_path / "memory"))


@pytest.mark.usefixtures("no_loading")
def test_info_says_whether_it_compared(trained: Trained, tmp_path: Path) -> None:
    assert "and it fits the base" in keepsight_cli("info", trained[0]).stdout
    shutil.copytree(trained[0], tmp_path / "memory", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "memory" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/model"}))
    result = keepsight_cli("info", tmp_path / "memory")
    assert result.exit_code == 0
    assert "not compared with the base" in result.stdout
