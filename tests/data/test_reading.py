"""Files and folders as people have them: which rows are found, and what is said where none can be."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_training import draw_digit, write_rows

import keepsight
from keepsight.data.check import DataError, Reading, check_dataset, load_dataset_any


def row(index: int = 0, **more: Any) -> dict[str, Any]:
    return {"image": f"{index}.png", "question": f"read {index}", "answer": "a1", **more}


def put(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
        return path
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in rows).encode()))
        return path
    return write_rows(path, list(rows))


def asked(source: Any, split: str = "train") -> list[str]:
    return [one["question"] for one in load_dataset_any(source, split).rows]


# Folders: (files with the index of their rows, split) -> the rows that are read, or what is said.
FOLDERS: dict[str, tuple[dict[str, list[int]], str, Any]] = {
    "one file": ({"anything.jsonl": [1, 2]}, "train", [1, 2]),
    "one packed file": ({"anything.jsonl.gz": [1]}, "train", [1]),
    "splits": ({"train.jsonl": [1], "test.jsonl": [2]}, "train", [1]),
    "other names of splits": ({"train.jsonl": [1], "dev.jsonl": [2]}, "validation", [2]),
    "the hub's names": ({"a/train.jsonl": [1], "a/valid.jsonl": [2]}, "dev", [2]),
    "splits as folders": ({"train/rows.parquet": [1], "test/rows.parquet": [2]}, "test", [2]),
    "shards in order": (
        {f"data/train-{n:05}-of-00012.parquet": [n] for n in (10, 2, 11, 0, 1, 3, 4, 5, 6, 7, 8, 9)},
        "train",
        list(range(12)),
    ),
    "parts with plain numbers": ({"part-10.jsonl": [10], "part-2.jsonl": [2]}, "train", [2, 10]),
    "nested": ({"x/y/z/train.jsonl": [3]}, "train", [3]),
    "beside what describes them": ({"dataset_info.json": [7], "train.jsonl": [1]}, "train", [1]),
    "rows without a split beside a test": ({"rows.jsonl": [1], "rows_test.jsonl": [2]}, "train", [1]),
    "hidden files": ({".cache/train.jsonl": [7], "train.jsonl": [1]}, "train", [1]),
    "metadata of splits": ({"train/metadata.jsonl": [1], "test/metadata.jsonl": [2], "notes.json": [9]}, "test", [2]),
    "no such split": (
        {"train.jsonl": [1], "test.jsonl": [2]},
        "validation",
        "has no split 'validation'. It has: test, train",
    ),
    "a missing shard": (
        {"train-00000-of-00003.parquet": [0], "train-00002-of-00003.parquet": [2]},
        "train",
        "1 of 3 shards are missing (number 1)",
    ),
    "several files": ({"a.jsonl": [1], "b.jsonl": [2]}, "train", "2 data files (a.jsonl, b.jsonl); name one of them"),
    "several datasets": ({"a/train.jsonl": [1], "b/train.jsonl": [2]}, "train", "several datasets (a, b); name one"),
    "pictures only": ({"cat/1.png": [1], "dog/2.png": [2]}, "train", "2 pictures and no words to them"),
    "an archive": ({"shard.tar": [1]}, "train", "It holds shard.tar: unpack that first"),
    "nothing": ({}, "train", "holds no dataset"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path) -> None:
    files, split, expected = FOLDERS[name]
    for file, rows in files.items():
        put(tmp_path / file, *(row(index) for index in rows))
    if isinstance(expected, list):
        assert asked(tmp_path, split) == [f"read {index}" for index in expected]
        return
    with pytest.raises(DataError) as error:
        load_dataset_any(tmp_path, split)
    assert expected in str(error.value)


def test_a_readme_may_say_which_files_are_a_split(tmp_path: Path) -> None:
    put(tmp_path / "one.jsonl", row(1))
    put(tmp_path / "two.jsonl", row(2))
    header = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two.jsonl\n"
    header += "  - split: held_out\n    path: 'o*.jsonl'\n"
    (tmp_path / "README.md").write_text(f"---\n{header}---\n# Digits\n")
    assert (asked(tmp_path), asked(tmp_path, "held_out")) == (["read 2"], ["read 1"])


@pytest.mark.parametrize(
    "header",
    [
        "configs: [{",
        "configs: 3",
        "configs:\n- data_files:\n  - split: train\n",
        "configs:\n- data_files: ../elsewhere/[\n",
        "configs:\n- data_files:\n  - split: train\n    path: no.jsonl\n",
        "a line of text",
    ],
)
def test_a_header_that_cannot_be_used_is_named(header: str, tmp_path: Path) -> None:
    put(tmp_path / "one.jsonl", row(1))
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Digits\n")
    with pytest.warns(keepsight.KeepsightWarning, match=r"README\.md cannot be read as the hub's.*data_files"):
        assert asked(tmp_path) == ["read 1"]


def several(*marks: str) -> str:
    """A header of datasets "set0", "set1", ..., one file each; what else is said of each."""
    return "configs:\n" + "".join(
        f"- config_name: set{i}\n  data_files: {i}.jsonl\n{mark}" for i, mark in enumerate(marks)
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (several("", ""), "none of them as the default"),
        (several("  default: true\n", "  default: true\n"), "several of them as the default"),
        (several("", "  default: true\n"), 1),
        (several("  default: true\n", ""), 0),
        (several("", "").replace("set1", "default"), 1),  # the hub's own rule
        (several("", "").split("- config_name: set1")[0], 0),
    ],
)
def test_of_several_datasets_in_a_header_the_default_is_read_or_none(
    header: str, expected: Any, tmp_path: Path
) -> None:
    for index in range(3):
        put(tmp_path / f"{index}.jsonl", row(index))
    put(tmp_path / "train.jsonl", row(7))  # by its name, what a folder without a header would give
    (tmp_path / "README.md").write_text(f"---\n{header}---\n# Digits\n")
    if isinstance(expected, int):
        assert asked(tmp_path) == [f"read {expected}"]
        assert bool(load_dataset_any(tmp_path).notes) == (header.count("config_name") > 1)
        return
    with pytest.raises(DataError, match=rf"2 datasets \(set0, set1\), and {expected}.*default: true"):
        load_dataset_any(tmp_path)


@pytest.mark.parametrize("files", ["[two.jsonl, one.jsonl]", "[{split: train, path: [one.jsonl, two.jsonl]}]"])
def test_files_of_any_names_are_a_split_if_a_readme_says_so(files: str, tmp_path: Path) -> None:
    for index, name in enumerate(("one", "two", "three")):
        put(tmp_path / "data" / f"{name}.jsonl", row(index))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- data_dir: data\n  data_files: {files}\n---\n")
    assert asked(tmp_path) == ["read 0", "read 1"]


@pytest.mark.parametrize("header", ["license: mit", "license: mit\nconfigs: []", ""])
def test_a_header_that_says_nothing_of_files_is_no_fault(header: str, tmp_path: Path) -> None:
    put(tmp_path / "one.jsonl", row(1))
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Digits\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        assert asked(tmp_path) == ["read 1"]


def test_shards_are_told_apart_and_each_finds_its_pictures(tmp_path: Path) -> None:
    draw_digit(1).save(tmp_path / "0.png")
    (tmp_path / "data").mkdir()
    draw_digit(2).save(tmp_path / "data" / "1.png")
    put(tmp_path / "data" / "train-00000-of-00002.jsonl", row(0), row(1))
    put(tmp_path / "data" / "train-00001-of-00002.jsonl", row(1), row(2))
    found = check_dataset(load_dataset_any(tmp_path))
    assert found.rows == 3
    ((where, what),) = found.problems
    assert where == "data/train-00001-of-00002.jsonl, line 2"
    assert "2.png: no such image file" in what


# Files: content -> what is said, or how many rows there are.
FILES: dict[str, tuple[str, bytes, Any]] = {
    "blank lines": ("a.jsonl", b'\n{"question": "x"}\n\n\n{"question": "y"}\n', 2),
    "a list, called lines": ("a.jsonl", b' [{"question": "x"}]', 1),
    "lines, called a list": ("a.json", b'{"question": "x"}\n{"question": "y"}', 2),
    "a list inside an object": ("a.json", b'{"version": 1, "data": [{"question": "x"}]}', 1),
    "a BOM": ("a.jsonl", b'\xef\xbb\xbf{"question": "x"}', 1),
    "other separators of lines": ("a.jsonl", '{"question": "x\u2028y\x85z"}'.encode(), 1),
    "a line break in a cell": ("a.csv", b'question,answer\r\n"x\r\ny",z\r\nb,c\r\n', 2),
    "a comma after the object": (
        "a.jsonl",
        b'{"q": 1},\n{"q": 2},\n',
        "line 1: .* have none between objects",
    ),
    "an object over several lines": ("a.jsonl", b'{\n"q": 1\n}\n', "One object over several lines is .json"),
    "cut off": ("a.jsonl", b'{"q": 1}\n{"q": ', "line 2: .* The file seems to be cut off here"),
    "no objects, line by line": ("a.json", b"[\n{},\n2\n]", "line 3: expected an object with columns, found int"),
    "UTF-16 without a mark": ("a.jsonl", '{"question": "x"}\n{"question": "é"}'.encode("utf-16-le"), 2),
    "UTF-32": ("a.jsonl", '{"question": "é"}'.encode("utf-32"), 1),
    "lines of an old Mac": ("a.jsonl", b'{"question": "x"}\r{"question": "y"}\r', 2),
    "Windows-1252": ("a.jsonl", b'{"q": "\x93"}\n', "line 1: not UTF-8 text .*iconv -f cp1252"),
    "a key twice": ("a.jsonl", b'{"q": 1}\n{"q": 1, "q": 2}\n', "line 2: the key 'q' is there twice"),
    "a key twice, in a list": ("a.json", b'[{"q": 1},{"m": {"q": 1, "q": 2}}]', "row 1: the key 'q' is there twice"),
    "a key twice, in the first": ("a.json", b'[{"q": 1, "q": 2}]', "row 0: the key 'q' is there twice"),
    "nested too deeply": ("a.jsonl", b"{}\n" + b'{"q":' + b"[" * 9999 + b"]" * 9999 + b"}", "line 2: .* too deeply"),
    "too many digits": ("a.jsonl", b'{"q": ' + b"9" * 5000 + b"}", "line 1: .*4300 digits"),
    "no comma in a list": ("a.json", b'[{"q": 1}\n{"q": 2}]', "line 2: not valid JSON"),
    "half a list": ("a.json", b'[{"q": 1},\n{"q": ', "line 2: not valid JSON"),
    "more behind a list": ("a.json", b'[{"q": 1}]\n[]', "line 2: not valid JSON .Extra data"),
    "no objects": ("a.jsonl", b"[1, 2]", "row 0: expected an object with columns, found int"),
    "a number": ("a.json", b"3", "holds one JSON int"),
    "columns of a frame": ("a.json", b'{"q": {"0": 1}}', "df.to_json"),
    "COCO": ("a.json", b'{"images": [{"id": 1}], "annotations": [{"id": 1}]}', "looks like COCO annotations"),
    "a web page": ("a.json", b"<html>not found</html>", "it begins with '<html>not found</html>'"),
    "Latin-1": ("a.jsonl", b'{"q": 1}\n{"q": "\xe9"}\n', r"a\.jsonl, line 2: not UTF-8 text \(byte 0xe9\).*iconv"),
    "a pointer": ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "no parquet": ("a.parquet", b"hello, world", "no Parquet file"),
    "half a parquet": ("a.parquet", b"PAR1hello, world", "cannot be read"),
    "no gzip": ("a.jsonl.gz", b"hello", "cannot be read"),
    "cells without a column": ("a.csv", b"q,a\n1,2,3\n", "line 2: 3 cells under 2 columns"),
    "a cell is missing": ("a.csv", b"q,a\n1,2\n3\n", "line 3: 1 cells under 2 columns"),
    "a column twice": ("a.csv", b"q,q\n1,2\n", "the column 'q' is there twice"),
    "a spreadsheet": ("a.xlsx", b"PK", "is a spreadsheet; save it as CSV"),
    "a pickle": ("a.pkl", b"\x80", "is a pickle, which runs code"),
    "an archive": ("a.zip", b"PK", "is an archive; unpack it"),
    "empty": ("a.csv", b"", "is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path) -> None:
    file, content, expected = FILES[name]
    path = tmp_path / file
    path.write_bytes(content)
    if isinstance(expected, int):
        assert len(load_dataset_any(path).rows) == expected
        return
    with pytest.raises(DataError, match=expected) as error:
        load_dataset_any(path)
    assert "\n" not in str(error.value)


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n\n{json.dumps(row(0))}\n\n{json.dumps(row(1))}\n")
    assert [load_dataset_any(path).where(index) for index in (0, 1)] == ["line 3", "line 5"]
    table = tmp_path / "a.csv"
    table.write_text('image,question,answer\n0.png,"a\nb",c\n1.png,d,e\n')
    assert [load_dataset_any(table).where(index) for index in (0, 1)] == ["line 2", "line 4"]


def test_cells_larger_than_the_csv_module_likes_leave_its_limit_alone(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("question\n" + "x" * 2**20 + "\n")
    assert len(load_dataset_any(tmp_path / "a.csv").rows[0]["question"]) == 2**20
    assert csv.field_size_limit() == before


def test_a_misspelt_file_and_a_picture_in_another_folder_are_recognised(tmp_path: Path) -> None:
    put(tmp_path / "train.jsonl", row(0))
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*train\.jsonl\?"):
        load_dataset_any(tmp_path / "trian.jsonl")
    (tmp_path / "images").mkdir()
    draw_digit(1).save(tmp_path / "images" / "0.png")
    ((_, what),) = check_dataset(load_dataset_any(tmp_path / "train.jsonl")).problems
    assert "--image-folder" in what
    assert (
        check_dataset(load_dataset_any(Reading(tmp_path / "train.jsonl", image_folder=tmp_path / "images"))).rows == 1
    )


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("é a.png", True),
        ("e\u0301 a.png", True),  # macOS's way
        (".\\é a.png", True),  # Windows'
        ("É A.PNG", False),
        ("%C3%A9%20a.png", False),
        ("é a.png ", False),
    ],
)
def test_one_file_written_in_other_ways_is_found_or_named(name: str, there: bool, tmp_path: Path) -> None:
    draw_digit(1).save(tmp_path / "é a.png")
    found = check_dataset(load_dataset_any(put(tmp_path / "a.jsonl", {**row(0), "image": name})))
    if there:
        assert found.good().rows == 1
    else:
        ((_, what),) = found.problems
        assert f"There is {tmp_path / 'é a.png'}" in what


def test_a_saved_dataset_one_folder_below_is_named(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([row(0)]).save_to_disk(str(tmp_path / "inner"))
    with pytest.raises(DataError, match=r"name its folder, .*inner"):
        load_dataset_any(tmp_path)


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("<image 1>then<image 2>", [0, 1]),
        ("<image 2>then<image 1>", [1, 0]),
        ("<image_1>again<image_1>and<image_2>", [0, 0, 1]),
    ],
)
def test_numbered_pictures(mark: str, expected: list[int], tmp_path: Path) -> None:
    from keepsight.data.check import read_sample

    for index in range(2):
        draw_digit(index).save(tmp_path / f"{index}.png")
    line = {"question": mark, "answer": "a1", "image_1": "0.png", "image_2": "1.png", "image_3": None}
    found = check_dataset(load_dataset_any(put(tmp_path / "a.jsonl", line))).good()
    pictures = [image.tobytes() for image in read_sample(found.dataset[0], found.source)["images"]]
    assert pictures == [draw_digit(index).tobytes() for index in expected]
