"""`keepsight train pvm` from the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Trained, corrupt, files_of, keepsight_cli, message
from tiny_training import FLAGS, make_data, read_rows, write_rows


def test_train_pvm(tiny_vlm: Path, data: Path, tmp_path: Path, image: Path) -> None:
    out = tmp_path / "out"
    flags = ["--layers", "1,3", "--width", 32, "--published-rule", "--seed", 7]
    flags += ["--blindfold-steps", 3, "--blindfold-share", 0.25]
    result = keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", out, *FLAGS, *flags)
    assert result.exit_code == 0, result.output
    assert "no bit of any tensor changed" in result.stdout
    assert re.search(
        r"step 12/12  loss [\d.]+  (?:blindfolded [\d.]+  )?sighted [\d.]+  "
        r"token accuracy [\d.]+  lr [\d.e-]+  memory grad [\d.e+-]+  tokens [\d,]+  "
        r"tokens/s [\d,]+  gates 1:",
        result.stderr,
    )
    facts = json.loads(keepsight_cli("info", out, "--json").stdout)
    assert facts["layers"] == [1, 3]
    assert facts["width"] == 32
    assert facts["causal"] is False
    assert f"{facts['parameters']:,} parameters" in result.stdout
    used = keepsight_cli("generate", out, "-i", image, "-p", "describe", "--max-new-tokens", 2)
    assert used.exit_code == 0, used.output


def test_texts_to_keep_the_language_by(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the light line falls over a quiet canvas . " * 50)
    keep = ["--keep-language", texts]
    dry = keepsight_cli("train", "pvm", tiny_vlm, "--dry-run", "--tokens", 64, *keep)
    assert dry.exit_code == 0, dry.output
    assert "--keep-language has no effect with --dry-run" in dry.output
    result = keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", tmp_path / "out", *FLAGS, *keep)
    assert result.exit_code == 0, result.output
    assert re.search(r"\d+ pieces of text to keep the language by", result.stderr)
    assert re.search(r"  language \d\.\d{4}  ", result.stderr)
    texts.unlink()
    for words in (["--dry-run", "--tokens", 64], ["-d", data, "-o", tmp_path / "none"]):
        assert "texts.txt" in message(keepsight_cli("train", "pvm", tiny_vlm, *words, *keep))


def test_a_mix_is_saved_checked_and_resumed(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    """Two datasets with weights go through --save-config, --config, the check and a resumed run."""
    other = make_data(tmp_path / "other", 4)
    out, file, small = tmp_path / "out", tmp_path / "run.yaml", tmp_path / "small.yaml"
    mix = [f"{data}=1", f"{other}=3"]
    told = (
        f"mix: {data} 25.0% (16 samples, each once); {other} 75.0% (4 samples, each 12 times): an epoch of 64 samples"
    )
    checked = keepsight_cli("data", "check", *mix)
    assert checked.exit_code == 0
    assert told in checked.stderr
    flags = [*FLAGS, "--max-steps", 2, "--save-steps", 1, "--save-config", file]
    first = keepsight_cli("train", "pvm", tiny_vlm, "-d", mix[0], "-d", mix[1], "-o", out, *flags)
    assert first.exit_code == 0, first.output
    assert told in first.stderr
    assert "train.jsonl 25.0%; train.jsonl 75.0%" in (out / "README.md").read_text()
    resumed = keepsight_cli("train", "pvm", "--config", file, "--resume")
    assert resumed.exit_code == 0, resumed.output
    changed = message(keepsight_cli("train", "pvm", "--config", file, "--resume", "-d", mix[0], "-d", f"{other}=2"))
    assert "weights of the datasets was [1.0, 3.0], now [1.0, 2.0]" in changed
    small.write_text(yaml.safe_dump({"source": str(tiny_vlm), "data": {str(data): 1, str(other): 3}}))
    assert keepsight_cli("train", "pvm", "--config", small, "--dry-run").exit_code == 0
    small.write_text(yaml.safe_dump({"source": str(tiny_vlm), "data": [{"path": str(data), "weight": 3}]}))
    assert "expected words, or NAME: VALUE" in message(keepsight_cli("train", "pvm", "--config", small, "-o", out))


def broken_image(data: Path) -> None:
    corrupt(data.parent / "3.png", "truncated")


def missing_image(data: Path) -> None:
    (data.parent / "3.png").unlink()


def missing_column(data: Path) -> None:
    write_rows(data, [{"messages": row["messages"]} for row in read_rows(data)])


def empty_dataset(data: Path) -> None:
    data.write_text("")


def without_images(data: Path) -> None:
    write_rows(data, [row | {"images": []} for row in read_rows(data)])


def missing_dataset(data: Path) -> None:
    data.unlink()


def miscounted(data: Path) -> None:
    write_rows(data, [row | {"images": row["images"] * 2} if i == 3 else row for i, row in enumerate(read_rows(data))])
    rows = read_rows(data)
    rows[3]["messages"][0]["content"] = "<image> describe"
    write_rows(data, rows)


@pytest.mark.parametrize(
    ("spoil", "lesson"),
    [
        (broken_image, "line 4, images[0]:"),
        (missing_image, "line 4, images[0]:"),
        (missing_column, "The data have no column of images"),
        (empty_dataset, "is empty"),
        (without_images, "no image; a sample without one teaches the memory nothing"),
        (missing_dataset, "no such file or folder"),
        (miscounted, "line 4, messages: 1 image placeholder for 2 images"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("flag", [["--resume"], ["--overwrite"]], ids=lambda flag: flag[0])
@pytest.mark.usefixtures("no_loading")
def test_bad_data_costs_nothing(
    spoil: Any, lesson: str, flag: list[str], trained: Trained, tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    before = files_of(out)
    spoil(data)
    assert lesson in message(keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", out, *FLAGS, *flag))
    assert files_of(out) == before


@pytest.mark.usefixtures("no_loading")
def test_an_output_folder_that_holds_something(trained: Trained, tiny_vlm: Path, data: Path) -> None:
    before = files_of(trained[0])
    text = message(keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", trained[0], *FLAGS))
    assert "--resume" in text
    assert "--overwrite" in text
    assert files_of(trained[0]) == before


@pytest.mark.parametrize(
    ("flags", "lesson"),
    [
        (["--layers", "a,b"], "--layers a,b: expected numbers"),
        (["--layers", "1,1"], "names a layer twice"),
        (["--layers", "99"], "out of range"),
        (["--width", "33"], "Try 32 or 48"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--lr", "0"], "expected a number above 0"),
        (["--report-to", "wandbb"], "'wandbb' is no tracker. Did you mean 'wandb'? Known: "),
        (["--report-to", "neptune"], "'neptune' is not installed: pip install neptune."),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_bad_flags(flags: list[str], lesson: str, tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lesson in message(keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", out, *FLAGS, *flags))


def test_options_without_effect_are_warned_of(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    dry = keepsight_cli("train", "pvm", tiny_vlm, "--dry-run", "--tokens", 64, "--control", "lora")
    assert dry.exit_code == 0, dry.output
    assert "--control has no effect with --dry-run" in dry.output
    idle = ["--tokens", 64, "--eval-steps", 2, "--eval-split", "test"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    refused = keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", tmp_path / "full", *FLAGS, *idle)
    for name in idle[::2]:
        assert f"{name} has no effect without" in refused.output, name
    cold = keepsight_cli("train", "vismem-formation", tiny_vlm, "--dry-run", "--tokens", 64, "--warm-start-lr", 1e-2)
    assert "--warm-start-lr has no effect without --warm-start-steps" in cold.output
