"""What tests of training and the command line share: a tiny VLM folder, a few digit images, a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from keepsight.lab.reference import build_model, save_reference
from keepsight.train.pvm.sft import SftSettings, TrainReport, train_pvm

QUICK = {"max_steps": 12, "batch_size": 4, "grad_accum": 1, "lr": 3e-3, "logging_steps": 4, "save_steps": 6}
FLAGS = ["--max-steps", "12", "--batch-size", "4", "--grad-accum", "1", "--lr", "3e-3", "--logging-steps", "4"]


def draw_digit(digit: int) -> Image.Image:
    image = Image.new("RGB", (32, 32))
    ImageDraw.Draw(image).text((10, 8), str(digit), fill="white")
    return image


def make_data(folder: Path, count: int = 16) -> Path:
    """A folder of digit images and a train.jsonl that describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        digit = index % 10
        draw_digit(digit).save(folder / f"{index}.png")
        rows.append(
            {
                "images": [f"{index}.png"],
                "messages": [
                    {"role": "user", "content": "describe"},
                    {"role": "assistant", "content": f"a1 {digit} . b1 {digit} ."},
                ],
            }
        )
    return write_rows(folder / "train.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained VLM of the reference's shape and its real processor."""
    folder = tmp_path_factory.mktemp("vlm") / "tiny"
    save_reference(build_model(), folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A good train.jsonl with its images, for the test to spoil."""
    return make_data(tmp_path / "data")


@pytest.fixture(scope="session")
def trained(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    """An adapter trained for a few steps on `tiny_vlm`; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    source = make_data(folder / "data")
    report = train_pvm(tiny_vlm, source, folder / "adapter", settings=SftSettings(**QUICK))
    return folder / "adapter", report
