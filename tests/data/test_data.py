"""Every way in which data can be read, and every way in which they can be wrong."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tiny_training import draw_digit, read_rows, write_rows

from keepsight.data.check import DataError, load_dataset_any, read_sample
from keepsight.data.check import check_dataset as look
from keepsight.data.conversations import read_chat
from keepsight.data.images import ImageError, open_image
from keepsight.data.rehearsal import Rehearsed

ANSWER = {"role": "assistant", "content": "a1 3 ."}


def check_dataset(source: Any, **options: Any) -> Any:
    return look(source, **options).good()


def checked(source: Any, **options: Any) -> list[dict[str, Any]]:
    result = check_dataset(load_dataset_any(source), **options)
    return [read_sample(row, result.source) for row in result.dataset]


def as_parquet(data: Path, folder: Path) -> Path:
    rows = read_rows(data)
    for row in rows:
        row["images"] = [str((data.parent / name).resolve()) for name in row["images"]]
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


def as_saved_dataset(data: Path, folder: Path) -> Path:
    images = [[draw_digit(index % 10)] for index in range(len(read_rows(data)))]
    columns = {"messages": [row["messages"] for row in read_rows(data)], "images": images}
    features = datasets.Dataset.from_list(read_rows(data)).features
    features["images"] = datasets.List(datasets.Image())
    dataset = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_image_folder(data: Path, folder: Path) -> Path:
    rows = [
        {"file_name": row["images"][0], "prompt": "describe", "answer": row["messages"][-1]["content"]}
        for row in read_rows(data)
    ]
    write_rows(data.parent / "metadata.jsonl", rows)
    data.unlink()
    return data.parent


def as_csv(data: Path, folder: Path) -> Path:
    lines = [f"{row['images'][0]},describe,{row['messages'][-1]['content']}" for row in read_rows(data)]
    path = data.with_suffix(".csv")
    path.write_text("\n".join(["image,prompt,answer", *lines]) + "\n")
    return path


def as_json_list(data: Path, folder: Path) -> Path:
    path = data.with_suffix(".json")
    path.write_text(json.dumps(read_rows(data), indent=1))
    return path


def as_base64(data: Path, folder: Path) -> Path:
    rows = read_rows(data)
    for index, row in enumerate(rows):
        text = base64.b64encode((data.parent / row["images"][0]).read_bytes()).decode()
        row["images"] = [[text, f"data:image/png;base64,{text}", {"bytes": text, "path": None}][index % 3]]
    return write_rows(folder / "rows.jsonl", rows)


def as_folder_with_one_file(data: Path, folder: Path) -> Path:
    return data.parent


@pytest.mark.parametrize(
    "convert",
    [as_parquet, as_saved_dataset, as_image_folder, as_csv, as_json_list, as_base64, as_folder_with_one_file],
    ids=lambda f: f.__name__,
)
def test_every_source_gives_the_same_samples(convert: Any, data: Path, tmp_path: Path) -> None:
    expected = checked(data)
    found = checked(convert(data, tmp_path))
    assert len(found) == len(expected) == 16
    for a, b in zip(expected, found, strict=True):
        assert a["messages"] == b["messages"]
        assert [image.tobytes() for image in a["images"]] == [image.tobytes() for image in b["images"]]


def test_canonical_form(data: Path) -> None:
    sample = checked(data)[3]
    assert sample["messages"] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a1 3 . b1 3 ."}]},
    ]
    assert sample["images"][0].mode == "RGB"


def test_marks_in_plain_text_place_the_images() -> None:
    messages = [{"role": "user", "content": "from <image> to <image> what changed"}, ANSWER]
    parts = read_chat(messages, [1, 2]).messages[0]["content"]
    assert [part["type"] for part in parts] == ["text", "image", "text", "image", "text"]


@pytest.mark.parametrize(
    ("messages", "images", "lesson"),
    [
        ([], 1, "messages: empty"),
        ("hello", 1, "expected a list"),
        ([{"role": "user"}, ANSWER], 1, 'messages[0]: expected {"role"'),
        ([{"role": "robot", "content": "x"}, ANSWER], 1, "role 'robot'"),
        ([{"role": "user", "content": "read"}], 1, "the last message is the user's"),
        (
            [{"role": "user", "content": "read"}, {"role": "assistant", "content": " "}],
            1,
            "assistant's message is empty",
        ),
        ([{"role": "user", "content": "<image> read"}, ANSWER], 2, "1 image placeholder for 2 images"),
        ([{"role": "user", "content": "<image> read"}, ANSWER], 0, "1 image placeholder for 0 images"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "read"}]}, ANSWER],
            1,
            "0 image placeholders for 1 image",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, ANSWER],
            1,
            "1 image inside the messages and 1 beside them",
        ),
        ([{"role": "user", "content": [{"type": "sound"}]}, ANSWER], 1, "expected parts"),
        (
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "image"}]}],
            1,
            "an image in the assistant",
        ),
    ],
)
def test_bad_conversations(messages: Any, images: int, lesson: str) -> None:
    with pytest.raises(DataError) as error:
        read_chat(messages, list(range(images)))
    assert lesson in str(error.value)


def spoil(data: Path, row: int, **changes: Any) -> None:
    rows = read_rows(data)
    rows[row] = {key: value for key, value in (rows[row] | changes).items() if value is not ...}
    write_rows(data, rows)


def missing_image(data: Path) -> None:
    (data.parent / "5.png").unlink()


def no_image(data: Path) -> None:
    (data.parent / "5.png").write_text("<html>not found</html>")


def truncated_image(data: Path) -> None:
    path = data.parent / "5.png"
    path.write_bytes(path.read_bytes()[:-40])


def empty_image(data: Path) -> None:
    (data.parent / "5.png").write_bytes(b"")


def bomb(data: Path) -> None:
    # A PNG header that claims 60,000 x 60,000 pixels.
    raw = bytearray((data.parent / "5.png").read_bytes())
    raw[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    (data.parent / "5.png").write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "lesson"),
    [
        (missing_image, "no such image file"),
        (no_image, "not an image that Pillow can read; it is a web page"),
        (truncated_image, "damaged or cut off"),
        (empty_image, "0 bytes"),
        (bomb, "too large to open safely"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_image_is_named_by_row_column_and_path(damage: Any, lesson: str, data: Path) -> None:
    damage(data)
    with pytest.raises(DataError) as error:
        checked(data)
    message = str(error.value)
    assert "line 6, images[0]: " in message
    assert "5.png" in message
    assert lesson in message
    assert "\n" not in message


def test_a_bad_image_inside_a_saved_dataset_is_named(tmp_path: Path) -> None:
    good = io.BytesIO()
    draw_digit(1).save(good, format="PNG")
    cells = [{"bytes": good.getvalue(), "path": None}, {"bytes": good.getvalue()[:60], "path": None}]
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    columns = {"prompt": ["read"] * 2, "answer": ["a1 1 ."] * 2, "image": cells}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"row 1, images\[0\]: these 60 bytes: the image is damaged or cut off"):
        checked(tmp_path / "saved")


def test_all_problems_at_once(data: Path) -> None:
    for index in range(1, 10):
        (data.parent / f"{index}.png").unlink()
    with pytest.raises(DataError) as error:
        checked(data)
    assert "9 samples that cannot be used" in str(error.value)
    assert "... and 4 more" in str(error.value)


def test_a_hint_is_given_once(data: Path) -> None:
    write_rows(data, [row | {"images": []} for row in read_rows(data)])
    with pytest.raises(DataError) as error:
        checked(data)
    assert str(error.value).count("--text-only skip") == 1
    with pytest.raises(DataError, match="no sample has an image"):
        checked(data, text_only="keep")


@pytest.mark.parametrize(
    ("columns", "lesson"),
    [
        (["messages"], "They have: messages."),
        (["images"], "--columns question=COLUMN --columns answer=COLUMN. docs"),
        (["foo", "bar"], "--columns question=foo --columns answer=bar --columns image=COLUMN"),
        (["image", "prompt"], "questions and answers without answer"),
        (["image", "prompt", "solution"], "--columns answer=solution"),
        (["image", "label"], "pictures with classes"),
        (["prompt", "chosen", "rejected", "image"], "preferences (DPO)"),
        (["prompt", "answer"], "--columns image=COLUMN"),
    ],
)
def test_what_is_missing_is_named_with_what_is_there_and_what_to_write(
    columns: list[str], lesson: str, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "x"}, ANSWER]
    row: dict[str, Any] = {name: chat if name == "messages" else "x" for name in columns}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError) as error:
        checked(path)
    assert lesson in str(error.value)


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="empty"):
        checked(path)


def test_an_empty_saved_dataset(data: Path, tmp_path: Path) -> None:
    datasets.Dataset.from_list(read_rows(data)).select([]).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match="none is empty: it holds no samples"):
        checked(tmp_path / "none")


@pytest.mark.parametrize("text", ["data:image/png;base64," + "A?" * 4000, "iVBORw0KGgo" + "A" * 4001, "x" * 4000])
def test_a_long_text_that_is_no_image_is_named_shortly(text: str, data: Path) -> None:
    write_rows(data, [row | {"images": [text]} for row in read_rows(data)[:1]])
    with pytest.raises(DataError, match=r"line 1, images\[0\]: .*") as error:
        checked(data)
    assert len(str(error.value)) < 300


def test_half_a_json_file(data: Path) -> None:
    data.write_text(data.read_text()[:-30])
    with pytest.raises(DataError, match=r"line 16: not valid JSON .* The file seems to be cut off here"):
        checked(data)


def test_half_a_parquet_file(data: Path, tmp_path: Path) -> None:
    path = as_parquet(data, tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be read"):
        checked(path)


@pytest.mark.parametrize("name", ["nothing.jsonl", "./nothing", "/no/such/folder"])
def test_a_source_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        checked(name)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no dataset"):
        checked(tmp_path)


def test_a_split_that_is_not_there(data: Path, tmp_path: Path) -> None:
    saved = as_saved_dataset(data, tmp_path)
    with pytest.raises(DataError, match=r"^\S+ has no split 'validation'\. It has: train\.$"):
        load_dataset_any(saved, "validation")


def test_samples_without_an_image(data: Path) -> None:
    spoil(data, 2, images=[])
    with pytest.raises(DataError, match="line 3, images: no image; a sample without one teaches the memory nothing"):
        checked(data)
    result = check_dataset(load_dataset_any(data), text_only="skip")
    assert result.rows == 15
    assert result.skipped == (("line 3", "no image"),)
    result = check_dataset(load_dataset_any(data), text_only="keep")
    assert result.rows == 16
    assert result.text_only == 1


def test_nothing_left_after_skipping(data: Path) -> None:
    write_rows(data, [row | {"images": []} for row in read_rows(data)])
    with pytest.raises(DataError, match="no sample is left; all 16 were skipped"):
        check_dataset(load_dataset_any(data), text_only="skip")


def test_over_long_samples(data: Path) -> None:
    spoil(data, 4, messages=[{"role": "user", "content": "describe"}, {"role": "assistant", "content": "a1 3 . " * 20}])

    def rehearse(sample: dict[str, Any], images: Any) -> Rehearsed:
        return Rehearsed(20 + len(sample["messages"][-1]["content"][0]["text"].split()), 20)

    source = load_dataset_any(data)
    options: dict[str, Any] = {"rehearse": rehearse, "max_length": 40}
    with pytest.raises(
        DataError, match=r"line 5, messages: 80 tokens after processing, over the 40 of --max-length\. Raise"
    ):
        check_dataset(source, **options)
    assert check_dataset(source, **options, over_long="skip").skipped == (
        ("line 5", "80 tokens, over the limit of 40"),
    )
    assert check_dataset(source, **options, over_long="truncate").rows == 16
    options["max_length"] = 18  # now the images themselves do not fit
    with pytest.raises(DataError, match="the images and the question alone fill the 18 tokens"):
        check_dataset(source, **options, over_long="truncate")


def test_a_file_that_vanishes_after_the_check_is_named(data: Path) -> None:
    result = check_dataset(load_dataset_any(data))
    shutil.rmtree(data.parent)
    with pytest.raises(ImageError, match="no such image file"):
        read_sample(result.dataset[0], result.source)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (20, 40)


def prompts(source: Any, **options: Any) -> list[dict[str, Any]]:
    result = check_dataset(load_dataset_any(source), kind="prompt", **options)
    return [read_sample(row, result.source) for row in result.dataset]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "0.png", "prompt": "read", "answer": "B", "level": 3},
        {"images": ["0.png"], "prompt": [{"role": "user", "content": "read"}], "solution": "B", "level": 3},
        {"images": ["0.png"], "messages": [{"role": "user", "content": "<image>read"}], "answer": "B", "level": 3},
        {"images": ["0.png"], "messages": [{"role": "user", "content": "read"}, ANSWER | {"content": "B"}], "level": 3},
        {
            "images": ["0.png"],
            "messages": [{"role": "user", "content": "read"}, ANSWER],
            "answer": "B",
            "level": 3,
        },
    ],
)
def test_prompts_end_with_the_question_and_keep_the_answer_and_other_columns(row: dict[str, Any], data: Path) -> None:
    (sample,) = prompts(write_rows(data, [row]), need_answer=True)
    assert sample["messages"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read"}]}]
    assert (sample["answer"], sample["level"]) == ("B", 3)
    assert [image.size for image in sample["images"]] == [(32, 32)]


def test_prompts_of_stored_images(data: Path, tmp_path: Path) -> None:
    samples = prompts(as_saved_dataset(data, tmp_path))
    assert [sample["answer"] for sample in samples[:2]] == ["a1 0 . b1 0 .", "a1 1 . b1 1 ."]
    assert all(sample["images"] for sample in samples)


def test_a_missing_answer_and_a_missing_question_are_named(data: Path) -> None:
    write_rows(
        data, [{"image": "0.png", "prompt": "read", "answer": ""}, {"image": "0.png", "prompt": "", "answer": 1}]
    )
    with pytest.raises(DataError, match="2 samples that cannot be used") as error:
        prompts(data, need_answer=True)
    assert "line 1, answer: empty; the reward compares with it" in str(error.value)
    assert "line 2, prompt: empty" in str(error.value)
    write_rows(data, [{"image": "0.png", "prompt": "read"}])
    assert prompts(data)[0]["answer"] is None
