"""`keepsight data check`: what it finds, and what it says of it; and dry runs, which read no weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_training import read_rows, write_rows
from transformers import AutoProcessor
from typer.testing import CliRunner

from keepsight.cli import app
from keepsight.data.check import check_dataset, load_dataset_any, read_sample
from keepsight.data.collate import ConversationCollator


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_good_data(data: Path, tiny_vlm: Path) -> None:
    rows = read_rows(data)
    write_rows(data, [*rows, rows[0], rows[1] | {"images": []}])
    result = run("data", "check", data, "--model", tiny_vlm, "--max-length", 100)
    assert result.exit_code == 0, result.output
    for told in (
        "18 of 18 are good",
        "17 with 1",
        "1 with 0",
        "5.6%",
        "1 equal an earlier sample",
        "Good for training with one of these",
    ):
        assert told in result.output, told
    assert "within the 100" in result.output


def test_bad_data_names_every_problem_and_fails(data: Path, tiny_vlm: Path) -> None:
    rows = read_rows(data)
    rows[0]["messages"][1]["content"] = "a1 3 . " * 200
    rows[1]["messages"].pop()
    write_rows(data, rows)
    (data.parent / "5.png").write_bytes(b"")
    result = run("data", "check", data, "--model", tiny_vlm, "--max-length", 100, "--show", 2)
    assert result.exit_code == 1
    assert "13 of 16 are good" in result.output
    for kind in ("bad: length", "bad: messages", "bad: images", "line 1, messages:", "line 2, messages:", "and 1 more"):
        assert kind in result.output, kind
    assert "Raise --max-length" in result.output


def test_questions(data: Path) -> None:
    write_rows(data, [{"image": "0.png", "prompt": "read", "answer": "3"}, {"image": "1.png", "prompt": "read"}])
    result = run("data", "check", data, "--for", "grpo")
    assert result.exit_code == 1
    assert "line 2, answer: empty" in result.output


def test_a_limit_without_a_model_and_data_without_images_are_lessons(data: Path) -> None:
    assert "name it with --model" in run("data", "check", data, "--max-length", 10).output
    write_rows(data, [row | {"images": []} for row in read_rows(data)])
    result = run("data", "check", data)
    assert result.exit_code == 1
    assert "nothing that a visual memory could learn" in result.output


@pytest.mark.parametrize("words", [("pvm",), ("pvm-grpo", "--policy", "full"), ("pvm-grpo", "--policy", "lora")])
def test_a_dry_run_needs_a_configuration_and_nothing_else(
    words: tuple[str, ...], tiny_vlm: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_vlm / "config.json", tmp_path)
    result = run("train", words[0], tmp_path, "--dry-run", "--tokens", 64, *words[1:])
    assert result.exit_code == 0, result.output
    words_told = " ".join(result.output.split())
    assert "every trained tensor" in words_told
    assert "387,747 of" in words_told or "the memory and" in words_told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_dry_run_measures_the_data(tiny_vlm: Path, data: Path) -> None:
    result = run("train", "pvm", tiny_vlm, "-d", data, "--dry-run")
    assert result.exit_code == 0, result.output
    (longest,) = re.findall(r"looked at: (\d+) tokens, 16 of them visual", result.output)
    checked = check_dataset(load_dataset_any(data))
    collator = ConversationCollator(AutoProcessor.from_pretrained(tiny_vlm))
    samples = [read_sample(row, checked.source) for row in checked.dataset]
    assert int(longest) == max(collator.measure(sample)[0] for sample in samples)


def test_a_dry_run_names_recipe_mix_and_what_cannot_be_used(
    tiny_vlm: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(data)
    few = write_rows(data.parent / "few.jsonl", rows[:1])
    monkeypatch.chdir(data.parent)  # short names stay on a line of the table
    told = run("train", "pvm", tiny_vlm, "-d", f"{data.name}=1", "-d", f"{few.name}=1", "--dry-run").output
    told = re.sub(r"[│\s]+", " ", told)
    assert "keepsight's" in told
    assert re.search(r"few\.jsonl 50\.0% \(1 sample, each", told)
    paper = run("train", "pvm", tiny_vlm, "--dry-run", "--tokens", 64, "--recipe", "paper", "--causal")
    assert "the paper's, but causal True" in paper.output
    write_rows(few, [rows[0], {**rows[0], "images": ["none.png"]}])
    bad = run("train", "pvm", tiny_vlm, "-d", few, "--dry-run")
    assert bad.exit_code == 1
    assert "few.jsonl, line 2, images[0]: " in bad.output


@pytest.mark.parametrize("command", ["eval", "diagnose"])
def test_questions_are_not_counted_twice(command: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    result = run(command, "-d", data, "-d", data.name)
    assert result.exit_code == 1
    assert "is named twice" in result.output


def other_names(data: Path) -> Path:
    rows = [
        {"photo": row["images"][0], "query text": "read", "gold": row["messages"][-1]["content"], "id": index}
        for index, row in enumerate(read_rows(data))
    ]
    return write_rows(data, rows)


MAPPED = ("--columns", "image=photo,question=query text", "--columns", "answer=gold")


def test_the_format_is_named_and_columns_are_mapped_alike_everywhere(
    data: Path, tiny_vlm: Path, tmp_path: Path
) -> None:
    other_names(data)
    refused = run("data", "check", data)
    assert refused.exit_code == 1
    assert "--columns question=" in refused.output.replace("\n", " ")
    good = run("data", "check", data, *MAPPED, "--model", tiny_vlm)
    assert good.exit_code == 0, good.output
    assert "VQA (question and answer)" in good.output
    assert re.search(r"ignored\s.*id; in 16 samples", good.output)
    steps = ("--max-steps", 1, "--batch-size", 1, "--grad-accum", 1)
    config = tmp_path / "run.yaml"
    config.write_text("columns: {image: photo, question: query text, answer: gold}\n")
    for words in (MAPPED, ("--config", config)):
        trained = run("train", "pvm", tiny_vlm, "-d", data, *words, "-o", tmp_path / words[0], *steps)
        assert trained.exit_code == 0, trained.output
        assert "format: VQA (question and answer)" in trained.output
        assert "ignored: id; in 16 samples" in trained.output
    asked = run("train", "vismem-formation", tiny_vlm, "-d", data, "-o", tmp_path / "v", "--max-steps", 1)
    assert asked.exit_code == 1
    assert "no format that keepsight knows" in asked.output


def test_a_folder_of_pictures_elsewhere(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.jsonl"
    data.rename(moved)
    assert run("data", "check", moved).exit_code == 1
    assert run("data", "check", moved, "--image-folder", data.parent).exit_code == 0
    assert "no such folder" in run("data", "check", moved, "--image-folder", tmp_path / "nowhere").output
