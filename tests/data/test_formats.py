"""Every format in every container ends in the same samples, and nothing that stands in a row is dropped in silence."""

from __future__ import annotations

import base64
import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from tiny_training import draw_digit

from keepsight.data.check import CheckedData, DataError, Reading, check_dataset, load_dataset_any, read_sample
from keepsight.data.collate import ConversationCollator
from keepsight.data.formats import CAPTION_PROMPT
from keepsight.data.rehearsal import Rehearsal
from keepsight.lab.reference import build_processor

COUNT = 3
QUESTION = CAPTION_PROMPT  # captions have no other


def answer(index: int) -> str:
    return f"a1 {index} ."


def turns(index: int, role: str = "role", content: str = "content", mark: str = "<image>\n") -> list[dict[str, Any]]:
    user, model = ("user", "assistant") if role == "role" else ("human", "gpt")
    return [{role: user, content: mark + QUESTION}, {role: model, content: answer(index)}]


def parts(picture: dict[str, Any], index: int) -> list[dict[str, Any]]:
    words, said = {"type": "text", "text": QUESTION}, {"type": "text", "text": answer(index)}
    return [{"role": "user", "content": [picture, words]}, {"role": "assistant", "content": [said]}]


def openai(file: str, index: int) -> dict[str, Any]:
    return {"messages": parts({"type": "image_url", "image_url": {"url": file}}, index)}


FORMATS: dict[str, tuple[str, Callable[[str, int], dict[str, Any]]]] = {
    "messages": ("chat (messages and images)", lambda f, i: {"images": [f], "messages": turns(i, mark="")}),
    "parts": ("chat (messages and images)", lambda f, i: {"images": [f], "messages": parts({"type": "image"}, i)}),
    "openai": ("OpenAI chat", openai),
    "qwen": ("Qwen chat", lambda f, i: {"messages": parts({"type": "image", "image": f}, i)}),
    "old qwen": ("Qwen chat", lambda f, i: {"messages": parts({"image": f}, i)}),
    "first qwen": ("Qwen-VL's first", lambda f, i: {"conversations": turns(i, "from", "value", f"<img>{f}</img>\n")}),
    "minicpm": (
        "chat (messages and images)",
        lambda f, i: {"image": {"<image_00>": f}, "conversations": turns(i, mark="<image_00>\n")},
    ),
    "llava": ("LLaVA", lambda f, i: {"id": str(i), "image": f, "conversations": turns(i, "from", "value")}),
    "sharegpt": ("ShareGPT", lambda f, i: {"images": [f], "conversations": turns(i, "from", "value")}),
    "trl": (
        "chat (prompt and completion",
        lambda f, i: {"images": [f], "prompt": turns(i, mark="")[:1], "completion": turns(i)[1:]},
    ),
    "prompt": ("prompt and answer", lambda f, i: {"image": f, "prompt": QUESTION, "answer": answer(i)}),
    "vqa": ("VQA", lambda f, i: {"image": f, "question": QUESTION, "answer": answer(i)}),
    "vqa answers": ("VQA", lambda f, i: {"image": f, "question": QUESTION, "answers": [answer(i), "b1", answer(i)]}),
    "swift": ("prompt and answer", lambda f, i: {"images": [f], "query": QUESTION, "response": answer(i)}),
    "alpaca": ("Alpaca", lambda f, i: {"images": [f], "instruction": QUESTION, "input": "", "output": answer(i)}),
    "cauldron": ("The Cauldron", lambda f, i: {"images": [f], "texts": [{"user": QUESTION, "assistant": answer(i)}]}),
    "captions": ("captions", lambda f, i: {"file_name": f, "text": answer(i)}),
}


def jsonl(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def windows(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "mit Umlaut ä.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode() + b"\r\n\r\n")
    return path


def utf16(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-16")
    return path


def json_list(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def json_lines_called_json(rows: list[dict[str, Any]], folder: Path) -> Path:
    return jsonl(rows, folder).rename(folder / "rows.json")


def json_list_called_jsonl(rows: list[dict[str, Any]], folder: Path) -> Path:
    return json_list(rows, folder).rename(folder / "rows.jsonl")


def json_object(rows: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps({"version": 1, "data": rows}))
    return path


def packed(rows: list[dict[str, Any]], folder: Path) -> Path:
    content = jsonl(rows, folder).read_bytes()
    (folder / "rows.jsonl").unlink()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    return folder / "a.jsonl.gz"


def table(rows: list[dict[str, Any]], path: Path, delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values()])
    return path


def comma(rows: list[dict[str, Any]], folder: Path) -> Path:
    return table(rows, folder / "rows.csv", ",")


def semicolon(rows: list[dict[str, Any]], folder: Path) -> Path:
    return table(rows, folder / "rows.csv", ";")


def tabs(rows: list[dict[str, Any]], folder: Path) -> Path:
    return table(rows, folder / "rows.tsv", "\t")


def pandas_csv(rows: list[dict[str, Any]], folder: Path) -> Path:
    return table([{k: str(v) for k, v in row.items()} for row in rows], folder / "rows.csv", ",")


def parquet(rows: list[dict[str, Any]], folder: Path) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


def hub_layout(rows: list[dict[str, Any]], folder: Path) -> Path:
    (folder / "data").mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Digits\n")
    for number, shard in enumerate((rows[:1], rows[1:])):
        name = folder / "data" / f"train-{number:05}-of-00002.parquet"
        datasets.Dataset.from_list(shard).to_parquet(str(name))
    datasets.Dataset.from_list(rows[:1]).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


def image_folder(rows: list[dict[str, Any]], folder: Path) -> Path:
    jsonl(rows, folder).rename(folder / "metadata.jsonl")
    return folder


def image_folder_csv(rows: list[dict[str, Any]], folder: Path) -> Path:
    comma(rows, folder).rename(folder / "metadata.csv")
    return folder


CONTAINERS = (
    *(jsonl, windows, utf16, json_list, json_lines_called_json, json_list_called_jsonl, json_object, packed),
    *(comma, semicolon, tabs, pandas_csv, parquet, hub_layout, image_folder, image_folder_csv),
)


def look(source: Any, **options: Any) -> CheckedData:
    return check_dataset(load_dataset_any(source), **options)


def samples(found: CheckedData) -> list[Any]:
    read = [read_sample(row, found.source) for row in found.good().dataset]
    return [(one["messages"], [image.tobytes() for image in one["images"]]) for one in read]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ein Ordner").mkdir()
    for index in range(COUNT):
        draw_digit(index).save(tmp_path / "ein Ordner" / f"{index} ü.png")
    return tmp_path / "ein Ordner"


EXPECTED = [
    (
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer(index)}]},
        ],
        [draw_digit(index).tobytes()],
    )
    for index in range(COUNT)
]


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda one: one.__name__)
def test_every_format_in_every_container_gives_the_same_samples(container: Any, folder: Path) -> None:
    differ = {}
    for name, (called, row) in FORMATS.items():
        inside = folder / name
        inside.mkdir()
        for file in folder.glob("*.png"):
            (inside / file.name).hardlink_to(file)
        found = look(container([row(f"{index} ü.png", index) for index in range(COUNT)], inside))
        if samples(found) != EXPECTED or not next(iter(found.formats)).startswith(called):
            differ[name] = (found.formats, found.problems)
    assert not differ


@pytest.mark.parametrize("name", FORMATS)
def test_images_in_the_data_in_every_way(name: str, folder: Path) -> None:
    """As base64, as a data address, as a file's address, as `datasets` stores them."""
    files = [folder / f"{index} ü.png" for index in range(COUNT)]
    texts = [base64.b64encode(file.read_bytes()).decode() for file in files]
    given = [texts[0], f"data:image/png;base64,{texts[1]}", files[2].as_uri()]
    assert samples(look(jsonl([FORMATS[name][1](one, i) for i, one in enumerate(given)], folder))) == EXPECTED
    stored = [{"bytes": file.read_bytes(), "path": None} for file in files]
    if name not in ("openai", "first qwen"):  # which hold text
        rows = datasets.Dataset.from_list([FORMATS[name][1](one, i) for i, one in enumerate(stored)])  # type: ignore[arg-type]
        assert samples(look(rows)) == EXPECTED


def test_an_image_may_be_framed_as_openai_frames_its_address(folder: Path) -> None:
    rows = [{"image": {"url": f"{i} ü.png"}, "question": QUESTION, "answer": answer(i)} for i in range(COUNT)]
    assert samples(look(jsonl(rows, folder))) == EXPECTED


def test_an_answer_may_be_in_parts_where_the_question_is_text(folder: Path) -> None:
    rows = [{"images": [f"{i} ü.png"], "messages": [*turns(i, mark="")[:1], parts({}, i)[1]]} for i in range(COUNT)]
    assert samples(look(jsonl(rows, folder))) == EXPECTED


def test_formats_may_be_mixed_in_one_file(folder: Path) -> None:
    names = ("llava", "qwen", "vqa")
    found = look(jsonl([FORMATS[name][1](f"{i} ü.png", i) for i, name in enumerate(names)], folder))
    assert samples(found) == EXPECTED
    assert len(found.formats) == COUNT
    rows = [FORMATS["vqa"][1]("0 ü.png", 0), {"picture": "0 ü.png", "words": "x"}]
    assert look(jsonl(rows, folder)).problems == (
        ("line 2", "format: none that keepsight knows; it has picture, words"),
    )


@pytest.mark.parametrize(
    ("row", "lesson"),
    [
        ({"question": "read", "answer": []}, "answer: empty"),
        ({"question": "read", "answer": {"text": "a1"}}, "answer: expected text"),
        ({"query": "read", "response": "a1", "history": [["read"]]}, "history: expected [question, answer]"),
        ({"messages": "hello"}, "messages: expected a list, found text that is not JSON"),
        ({"messages": {"role": "user", "content": "x"}}, "messages: expected a list"),
        ({"conversations": [["read", "a1"]]}, 'messages[0]: expected {"role"'),
        ({"texts": ["x"]}, 'texts: expected {"user"'),
    ],
)
def test_a_cell_of_another_kind_is_named(row: dict[str, Any], lesson: str, folder: Path) -> None:
    ((where, what),) = look(jsonl([{"images": ["0 ü.png"], **row}], folder)).problems
    assert (where, what[: len(lesson)]) == ("line 1", lesson)


def test_an_answer_that_only_calls_a_tool_needs_no_words(folder: Path) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": CALL}
    messages = [U, called, {"role": "tool", "tool_call_id": "1", "content": "x"}, A]
    found = look(jsonl([{"images": ["0 ü.png"], "messages": messages}], folder)).good()
    assert [m["role"] for m in read_sample(found.dataset[0], found.source)["messages"]] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_columns_of_other_names(folder: Path) -> None:
    rows = [
        {"photo": f"{i} ü.png", "Frage": QUESTION, "Antwort": answer(i), "prompt": "not this"} for i in range(COUNT)
    ]
    columns = {"image": "photo", "question": "Frage", "answer": "Antwort"}
    found = look(Reading(jsonl(rows, folder), columns))
    assert samples(found) == EXPECTED
    assert found.told["ignored"][1] == {"prompt": COUNT}
    with pytest.raises(DataError, match=r"has no column 'Foto'\. It has: photo, Frage, Antwort, prompt"):
        look(Reading(jsonl(rows, folder), {"image": "Foto"}))
    with pytest.raises(DataError, match=r"picture is no column of ours\. Known are messages, question"):
        look(Reading(jsonl(rows, folder), {"picture": "photo"}))


def test_several_columns_of_images(folder: Path) -> None:
    row = {"image_1": "0 ü.png", "image_2": "1 ü.png", "image_3": None, "question": "both?", "answer": "no"}
    found = look(Reading(jsonl([row], folder), {"images": "image_1+image_2+image_3"}))
    assert found.image_counts == (2,)


def test_images_in_another_folder(folder: Path, tmp_path: Path) -> None:
    rows = [FORMATS["llava"][1](f"{index} ü.png", index) for index in range(COUNT)]
    apart = tmp_path / "apart"
    apart.mkdir()
    path = jsonl(rows, apart)
    assert "no such image file" in look(path).problems[0][1]
    assert samples(look(Reading(path, image_folder=folder))) == EXPECTED


def test_a_label_that_contains_a_mark_is_text(folder: Path) -> None:
    said = "![figure](<image>) a1 <video>"
    messages = [{"role": "user", "content": "<image>to Markdown"}, {"role": "assistant", "content": said}]
    found = look(jsonl([{"images": ["0 ü.png"], "messages": messages}], folder)).good()
    assert read_sample(found.dataset[0], found.source)["messages"][1]["content"] == [{"type": "text", "text": said}]


# Nothing is dropped in silence: (what is added to a row, what is said of it, how to do without).
U, A = {"role": "user", "content": "read"}, {"role": "assistant", "content": "a1 1 ."}
CALL = [{"type": "function", "function": {"name": "crop", "arguments": {}}}]
VIDEO = {"type": "video", "video": "a.mp4"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "videos": ({"videos": ["a.mp4"]}, "videos: videos; training reads pictures only", "videos"),
    "video": ({"video": "a.mp4"}, "video: a video", "video"),
    "audio": ({"audio": "a.wav"}, "audio: sound", "audio"),
    "video mark": ({"messages": [{**U, "content": "<image><video>read"}, A]}, "<video> in the text", ""),
    "video part": (
        {"messages": [{**U, "content": [{"type": "image"}, VIDEO]}, A]},
        "a part of type video; training",
        "video",
    ),
    "audio part": (
        {"messages": [{**U, "content": [{"type": "image"}, {"type": "input_audio", "data": ""}]}, A]},
        "a part of type input_audio; training",
        "input_audio",
    ),
    "tools": ({"tools": CALL}, "tools: tools, which this model's chat template does not write", "tools"),
    "tool_calls": ({"messages": [U, {**A, "tool_calls": CALL}]}, "messages[1]: tool_calls, which", "tool_calls"),
    "function_call": ({"messages": [U, {**A, "function_call": {"name": "f"}}]}, "tool_calls, which", "tool_calls"),
    "reasoning": (
        {"messages": [U, {**A, "reasoning_content": "I see"}]},
        "reasoning_content, which",
        "reasoning_content",
    ),
    "system": ({"system": "Answer in French."}, "messages[0]: the model cannot read 'Answer'", "system"),
    "system's message": (
        {"messages": [{"role": "system", "content": "Answer in French."}, U, A]},
        "messages[0]: the model cannot read 'Answer'",
        "system",
    ),
    "system under another name": ({"system_prompt": "read"}, "--columns system=system_prompt", "system_prompt"),
    "loss": ({"messages": [U, {**A, "loss": False}, U, {**A, "loss": 0.5}]}, "messages[3]: loss 0.5", "loss"),
    "weight 0": ({"messages": [U, {**A, "weight": 0}]}, "the weight of every answer is 0", "weight"),
    "weight .5": ({"messages": [U, {**A, "weight": 0.5}]}, "weight 0.5; a message is learned (1) or not", "weight"),
    "sample weight": ({"weight": 2}, "weight: a weight; samples count alike", "weight"),
    "two images": ({"image": "1 ü.png"}, "two columns hold some, images and image", "image"),
    "a second image": (
        {"depth": base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"0" * 99).decode()},
        "a second picture",
        "depth",
    ),
    "a second file": ({"mask": "2.png"}, "a second picture", "mask"),
    "a second number": ({"image2": "2.png"}, "a second picture", "image2"),
    "options": ({"options": ["a", "b"]}, "the options of the question", "options"),
    "options by letter": ({"A": "cat", "B": "dog", "C": ""}, "A to B: the options of the question", "A,B"),
}
IGNORED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown columns": ({"id": 7, "source": "web"}, "id"),
    "many columns": ({f"c{i}": i + 1 for i in range(20)}, "c19"),
    "another name of the same file": ({"file": "photos/0 ü.png"}, "file"),
    "a file of no picture": ({"notes": "2.txt"}, "notes"),
    "ids of calls": (
        {"messages": [U, A, {"role": "tool", "content": "read", "tool_call_id": "7"}, A]},
        "tool_call_id of messages",
    ),
    "keys of messages": ({"messages": [{**U, "timestamp": 1}, A]}, "timestamp of messages"),
    "names": ({"messages": [{**U, "name": "Ann"}, A]}, "name of messages"),
    "keys of text parts": (
        {"messages": [{**U, "content": [{"type": "image"}, {"type": "text", "text": "read", "cache": 1}]}, A]},
        "cache of text parts",
    ),
    "keys of image parts": (
        {"messages": [{**U, "content": [{"type": "image", "max_pixels": 9}, {"type": "text", "text": "read"}]}, A]},
        "max_pixels of image parts",
    ),
}


def rehearsed(source: Any, processor: Any = None, **options: Any) -> CheckedData:
    data = load_dataset_any(source)
    collator = ConversationCollator(processor or build_processor())
    return check_dataset(data, rehearse=Rehearsal(collator, ignore=data.reading.ignore), **options)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_by_name_unless_it_is_to_be_ignored(name: str, folder: Path) -> None:
    more, lesson, way_out = REFUSED[name]
    path = jsonl([{"images": ["0 ü.png"], "messages": [U, A], **more}], folder)
    found = rehearsed(path)
    assert lesson in found.problems[0][1]
    if not name.startswith("system"):
        assert f"--ignore {way_out}" in found.hints[0]
    if not way_out:  # the built-in model does not know the word either
        return
    found = rehearsed(Reading(path, ignore=tuple(way_out.split(","))))
    assert found.good().rows == 1
    assert all(any(one in word for word in found.told.get("ignored", (0, {}))[1]) for one in way_out.split(","))


@pytest.mark.parametrize("name", IGNORED)
def test_what_is_not_used_is_listed(name: str, folder: Path) -> None:
    more, word = IGNORED[name]
    found = rehearsed(jsonl([{"images": ["0 ü.png"], "messages": [U, A], **more}], folder)).good()
    assert word in found.told["ignored"][1]
    assert any(word in line for subject, line in found.told_lines() if subject == "ignored")


def test_what_the_chat_template_writes_is_used(folder: Path) -> None:
    processor = build_processor()
    processor.chat_template = (
        "{%- if tools -%} tools {{tools|length}}{%- endif -%}"
        "{%- for m in messages -%}{{' ' + m['role'] + ' '}}{{m.get('reasoning_content', '')}}"
        "{%- for p in m['content'] -%}{{p['text'] if p['type']=='text' else '<|image_pad|>'}}{%- endfor -%}"
        "{%- for c in m.get('tool_calls', []) -%}{{c['function']['name']}}{%- endfor -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{' assistant '}}{%- endif -%}"
    )
    spoken = {**A, "reasoning_content": "read", "tool_calls": CALL}
    row = {"images": ["0 ü.png"], "messages": [U, spoken], "tools": CALL, "system": "read"}
    found = rehearsed(jsonl([row], folder), processor).good()
    assert "ignored" not in found.told
    sample = read_sample(found.dataset[0], found.source)
    text = "".join(text for text, _ in ConversationCollator(processor).segments(sample["messages"], sample["tools"]))
    assert text == "tools 1 system read user <|image_pad|>read assistant reada1 1 .crop"


def test_calls_of_functions_are_the_same_in_every_form(folder: Path) -> None:
    """OpenAI's tool_calls, its older function_call, and ShareGPT's, with tools described or only named."""
    arguments = {"x": 1}
    call = {"type": "function", "function": {"name": "crop", "arguments": arguments}}
    told = {"name": "crop", "parameters": {"type": "object"}}
    old = {"name": "crop", "arguments": json.dumps(arguments)}
    asked, written = {"from": "human", "value": "<image>read"}, {"from": "gpt", "value": "a1 1 ."}
    rows = [
        {
            "messages": [U, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "seen"}, A],
            "tools": [{"type": "function", "function": told}],
        },
        {
            "messages": [U, {"role": "assistant", "function_call": old}, {"role": "function", "content": "seen"}, A],
            "tools": [told],
        },
        {
            "conversations": [
                asked,
                {"from": "function_call", "value": json.dumps({"name": "crop", "arguments": arguments})},
                {"from": "observation", "value": "seen"},
                written,
            ],
            "tools": json.dumps([told]),
        },
    ]
    found = look(jsonl([{"images": ["0 ü.png"], **row} for row in rows], folder)).good()
    first, *others = [read_sample(row, found.source) for row in found.dataset]
    for sample in others:
        assert [sample[name] for name in ("messages", "tools")] == [first[name] for name in ("messages", "tools")]
    row = {"conversations": [asked, {"from": "function_call", "value": "crop(1)"}, written]}
    ((_, what),) = look(jsonl([{"images": ["0 ü.png"], **row}], folder)).problems
    assert what.startswith("messages[1]: expected a list, found text that is not JSON")


@pytest.mark.parametrize("answer", [float("nan"), float("inf"), None, "", []])
def test_a_cell_without_an_answer_is_never_learned(answer: Any, folder: Path) -> None:
    ((_, what),) = look(jsonl([{"image": "0 ü.png", "question": "read", "answer": answer}], folder)).problems
    assert what.startswith("answer: ")


def test_a_text_cut_within_a_character_is_named(folder: Path) -> None:
    for row in ({"question": "\ud83d", "answer": "a1"}, {"question": "read", "answer": "a1 \ude00"}):
        ((_, what),) = look(jsonl([{"image": "0 ü.png", **row}], folder)).problems
        assert "half of a character" in what


def test_a_message_of_weight_0_is_read_and_not_learned(folder: Path) -> None:
    collator = ConversationCollator(build_processor())
    messages = [U, {**A, "weight": 0}, U, {**A, "content": "b1 2 .", "weight": 1}]
    found = rehearsed(jsonl([{"images": ["0 ü.png"], "messages": messages}], folder)).good()
    batch = collator([read_sample(found.dataset[0], found.source)])
    learned = batch["input_ids"][0][batch["labels"][0] != -100]
    assert collator.tokenizer.decode(learned).split() == ["b1", "2", ".", "<eos>"]
    assert "a1 1 ." in collator.tokenizer.decode(batch["input_ids"][0])


def test_columns_that_parquet_fills_with_nothing_are_not_there(folder: Path) -> None:
    rows = [
        {
            "images": ["0 ü.png"],
            "messages": [U, {**A, "tool_calls": None}],
            "videos": [],
            "system": None,
            "tools": None,
        },
        {"images": ["1 ü.png"], "messages": [U, {**A, "name": None}], "videos": [], "system": "", "tools": None},
    ]
    found = rehearsed(parquet(rows, folder)).good()
    assert not found.told


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress], ids=["gz", "bz2", "xz"])
def test_packed_files(pack: Any, folder: Path) -> None:
    rows = [FORMATS["vqa"][1](f"{i} ü.png", i) for i in range(COUNT)]
    suffix = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}[pack.__module__]
    path = folder / f"rows.csv.{suffix}"
    path.write_bytes(pack(comma(rows, folder).read_bytes()))
    assert samples(look(path)) == EXPECTED
