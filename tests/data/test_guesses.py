"""Data of no format of ours: what the message says to write makes them good, and nothing else is guessed from them."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_training import draw_digit, write_rows

from keepsight.data.check import CheckedData, DataError, check_dataset, load_dataset_any
from keepsight.data.tables.reading import reading_of


def look(source: Any, *columns: str, **options: Any) -> CheckedData:
    return check_dataset(load_dataset_any(reading_of(source, columns, **options)))


def advised(text: str) -> list[str]:
    """What stands behind every --columns of a message."""
    words = shlex.split(" ".join(re.findall(r'--columns (?:"[^"]+"|[\w"=,]+ ?)+', text)))
    return [word.rstrip(".") for word in words if "=" in word]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(2):
        draw_digit(index).save(tmp_path / f"{index}.png")
    return tmp_path


# Rows as they are published; their question and answer once the columns are named.
ROWS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "SLAKE": ({"img_name": "0.png", "question": "What?", "answer": "liver", "q_lang": "en"}, ("What?", "liver")),
    "InfographicVQA": (
        {"image_local_name": "0.png", "ocr_output_file": "0.json", "question": "What?", "answers": ["7", "7", "8"]},
        ("What?", "7"),
    ),
    "ChartQA": ({"image": "0.png", "query": "What?", "label": ["7"], "human_or_machine": 0}, ("What?", "7")),
    "POPE": ({"image": "0.png", "text": "A dog?", "label": "no", "category": 3}, ("A dog?", "no")),
    "lmms": ({"img_path": "0.png", "text": "What?", "gt": "7"}, ("What?", "7")),
    "A-OKVQA": ({"split": "train", "image": "0.png", "question": "What?", "direct_answers": ["7"]}, ("What?", "7")),
    "M3IT": ({"instruction": "What?", "inputs": "", "image_path": "0.png", "outputs": "7"}, ("What?", "7")),
    "Flickr30k": (
        {"image_name": "0.png", "comment_number": "0", "comment": "A 7 ."},
        ("Describe this image.", "A 7 ."),
    ),
    "Donut": ({"image": "0.png", "ground_truth": '{"total": 7}'}, ("Describe this image.", '{"total": 7}')),
    "classes": ({"image": "0.png", "label": "cat"}, ("Describe this image.", "cat")),
    "columns with spaces": ({"image": "0.png", "the question": "What?", "the answer": "7"}, ("What?", "7")),
    "preferences": (
        {"images": ["0.png"], "messages": [{"role": "user", "content": "What?"}], "chosen": "7", "rejected": "8"},
        ("What?", "7"),
    ),
    "preferences as messages": (
        {
            "images": ["0.png"],
            "prompt": [{"role": "user", "content": "What?"}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "7"}]}],
            "rejected": [{"role": "assistant", "content": "8"}],
        },
        ("What?", "7"),
    ),
    "preferences of from and value": (
        {
            "image": "0.png",
            "conversations": [{"from": "human", "value": "<image>What?"}],
            "chosen": {"from": "gpt", "value": "7"},
            "rejected": {"from": "gpt", "value": "8"},
        },
        ("What?", "7"),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_the_message_says_makes_the_data_good(name: str, folder: Path) -> None:
    row, expected = ROWS[name]
    path = write_rows(folder / "rows.jsonl", [row, row])
    with pytest.raises(DataError) as error:
        look(path).good()
    columns = advised(str(error.value))
    assert columns, str(error.value)
    kept = json.loads(look(path, *columns).good().kept[0]["messages"])
    assert tuple(part["text"] for message in kept for part in message["content"] if "text" in part) == expected


def test_a_picture_that_nobody_names_is_not_left_out(folder: Path) -> None:
    qa = {"question": "What?", "answer": "7"}
    for more, lesson in (
        ({"img_name": "0.png"}, "img_name: it seems to name a picture, and the sample has none: --columns image="),
        ({"image_url": "https://example.org/a"}, "the sample has none: download it, and name its file"),
        ({"scan": {"bytes": (folder / "0.png").read_bytes(), "path": None}}, "--columns image=scan"),
    ):
        found = look(datasets.Dataset.from_list([{**qa, **more}]))
        assert lesson in found.problems[0][1]
    assert look(datasets.Dataset.from_list([{**qa, "url": "https://example.org/a"}])).problems == (
        ("row 0", "images: no image; a sample without one teaches the memory nothing"),
    )


def test_boxes_that_stand_for_words_are_not_learned_as_words(folder: Path) -> None:
    said = [{"role": "user", "content": "<image>Find <ref-object>"}, {"role": "assistant", "content": "<bbox>"}]
    row = {"messages": said, "images": ["0.png"], "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]}}
    path = write_rows(folder / "rows.jsonl", [row])
    assert look(path).problems[0][1].startswith("objects: boxes that <bbox>")
    assert look(path, ignore=["objects"]).good().rows == 1


QA = {"question": "What?", "answer": "7"}
OBJECTS: dict[str, tuple[Any, Any]] = {
    "COCO captions": (
        {"images": [{"id": 5, "file_name": "0.png"}], "annotations": [{"id": 1, "image_id": 5, "caption": "A 7."}] * 2},
        ["0.png", "0.png"],
    ),
    "COCO boxes": (
        {"images": [{"id": 5, "file_name": "0.png"}], "annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4]}]},
        "looks like COCO annotations .* not of captions",
    ),
    "samples under ids": ({"7": {"image": "0.png", **QA}, "8": {"image": "1.png", **QA}}, ["0.png", "1.png"]),
    "samples under pictures": ({"0.png": QA, "1.png": QA}, ["0.png", "1.png"]),
    "VQA v2's questions": ({"data_subtype": "train2014", "questions": [{"question": "x"}]}, "one half of VQA v2"),
    "VQA v2's answers": ({"data_subtype": "train2014", "annotations": [{"answers": []}]}, "one half of VQA v2"),
    "InternVL's list": ({"a": {"root": "p/", "annotation": "a.jsonl"}}, "give these, a.jsonl with --image-folder p/"),
    "columns": ({"image": ["0.png"], "question": ["x"], "answer": ["y"]}, "holds columns, and expected are rows"),
    "pandas' columns": ({"image": {"0": "0.png"}, "question": {"0": "x"}}, "holds columns, and expected are rows"),
    "captions under pictures": ({"0.png": "A 0.", "1.png": "A 1."}, ["0.png", "1.png"]),
    "splits": ({"train": [{"image": "0.png", **QA}], "test": [{"image": "1.png", **QA}]}, "several lists of samples"),
    "nothing": ({}, "is empty"),
    "one sample": ({"image": "0.png", **QA}, "one JSON object with the keys image, question, answer"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_one_object_that_holds_the_data(name: str, folder: Path) -> None:
    content, expected = OBJECTS[name]
    path = folder / "rows.json"
    path.write_text(json.dumps(content))
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            look(path)
        return
    found = look(path).good()
    assert [Path(row["images"][0]["path"]).name for row in found.kept] == expected
    assert found.source.notes


def test_a_webdataset_is_named_with_the_command_that_makes_it_one_of_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(folder / "a.tar", "w") as archive:
        for index in range(2):
            for suffix, content in (("png", (folder / f"{index}.png").read_bytes()), ("txt", f"A {index}.".encode())):
                entry = tarfile.TarInfo(f"{index:04}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match="is a WebDataset") as error:
        look("a.tar")
    exec(re.search(r'python -c "([^"]+)"', str(error.value))[1])  # type: ignore[index]
    assert look("a.parquet", *advised(str(error.value))[0].split(",")).good().rows == 2


def test_words_beside_pictures_and_tables_without_names(folder: Path) -> None:
    (folder / "0.txt").write_text("A 0.")
    with pytest.raises(DataError, match=r"a file of words for each \(0\.png, 0\.txt\).* metadata\.jsonl"):
        look(folder)
    (folder / "a.tsv").write_text("A 0.\thttp://example.org/0.jpg\nA 1.\thttp://example.org/1.jpg\n")
    with pytest.raises(DataError, match="Its first line seems to be a sample"):
        look(folder / "a.tsv")
    (folder / "b.csv").write_text('image| question| answer\n0.png| "A, B"?| 7\n')
    found = look(folder / "b.csv").good()
    assert json.loads(found.kept[0]["messages"])[0]["content"][1]["text"] == '"A, B"?'
    (folder / "c.csv").write_text('image, question, answer\n0.png, "A, B?", 7\n')
    found = look(folder / "c.csv").good()
    assert json.loads(found.kept[0]["messages"])[0]["content"][1]["text"] == "A, B?"
