"""`keepsight info`: models, adapters and what training would make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from command_line import Trained, keepsight_cli, message, spoiled


def test_info_of_an_adapter(trained: Trained, tiny_vlm: Path) -> None:
    folder, report = trained
    facts = json.loads(keepsight_cli("info", folder, "--json").stdout)
    assert facts["method"] == "PVM"
    assert facts["base"] == str(tiny_vlm)
    assert facts["parameters"] == report.trainable
    assert facts["causal"] is True
    assert {int(layer): gate for layer, gate in facts["gates"].items()} == pytest.approx(report.gates)
    shown = keepsight_cli("info", folder).stdout
    assert f"{report.trainable:,}" in shown
    assert "gate of layer 1" in shown


def test_info_of_a_model_counts_what_training_makes(trained: Trained, tiny_vlm: Path) -> None:
    facts = json.loads(keepsight_cli("info", tiny_vlm, "--json").stdout)
    assert facts["memory"]["parameters"] == trained[1].trainable
    assert facts["parameters"] == trained[1].frozen
    assert facts["family"] == "Qwen3-VL"


@pytest.mark.usefixtures("no_loading")
def test_info_needs_a_configuration_only(tmp_path: Path) -> None:
    from families import FAMILIES

    for family in FAMILIES:
        family.config().save_pretrained(tmp_path / family.name)
        result = keepsight_cli("info", tmp_path / family.name)
        assert result.exit_code == 0, result.output
        assert "PvmConfig() gives" in result.stdout


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "ffn", "blocks", "parameters"),
    [(36, 4096, 32, 12288, [8, 16, 24], 27_922_179), (36, 2560, 32, 9728, [5, 11, 17], 22_728_963)],
)
def test_info_knows_the_papers_sizes(
    layers: int, hidden: int, heads: int, ffn: int, blocks: list[int], parameters: int, tmp_path: Path
) -> None:
    text = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn}
    config = transformers.Qwen3VLConfig(text_config=text | {"num_key_value_heads": 8, "head_dim": 128})
    config.save_pretrained(tmp_path / "big")
    facts = json.loads(keepsight_cli("info", tmp_path / "big", "--json").stdout)
    assert facts["memory"]["layers"] == blocks
    assert facts["memory"]["parameters"] == parameters


@pytest.mark.parametrize("how", ["truncated", "not finite", "bad json"])
def test_info_of_a_broken_adapter(how: str, trained: Trained, tmp_path: Path) -> None:
    message(keepsight_cli("info", spoiled(trained[0], tmp_path, how)))
