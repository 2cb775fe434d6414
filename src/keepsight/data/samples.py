"""From rows, whatever their columns, to samples of one form, and back from the trainer's dataset to images.

A sample of supervised training is {"messages", "images"}, its last message the assistant's. A sample of reinforcement
learning has the messages up to the question only, and every other column beside them, "answer" among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from keepsight.data.conversations import DataError, normalise_messages
from keepsight.data.images import ImageError, find_image, is_base64, open_image
from keepsight.data.reading import Source, import_datasets

Kind = Literal["chat", "prompt"]
"""What a sample is for: "chat" to learn its answers by heart, "prompt" to be answered and rewarded."""

_IMAGES = ("images", "image", "file_names", "file_name")
_ANSWERS = ("answer", "solution", "completion")
_CHAT_COLUMNS = ("messages", "prompt", "answer", "completion", *_IMAGES)
_EXPECTED = (
    """Expected columns: "messages" (a chat) and "images" (a list of files), or "prompt", "answer" and "image"."""
)


def sample_reader(source: Source, kind: Kind = "chat") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """How to turn a raw row into a sample, judged by the columns.

    Raises:
        DataError: if the columns have no reading; the returned function raises it for single rows.
    """
    columns = set(source.columns)
    images = next((name for name in _IMAGES if name in columns), None)
    answer = next((name for name in _ANSWERS if name in columns), None)
    if kind == "chat" and answer == "solution":
        answer = None
    if "messages" in columns:
        missing = [] if images else ["images"]
    elif kind == "prompt" and "prompt" in columns:
        missing = [] if images else ["image"]
    elif columns & {"prompt", "answer", "completion"}:
        missing = [name for name, there in (("prompt", "prompt" in columns), ("answer", answer)) if not there]
        missing += [] if images else ["image"]
    else:
        missing = ["messages"] + ([] if images else ["images"])
    if missing:
        quoted = " and ".join(f'"{name}"' for name in missing)
        raise DataError(
            f"{source.name} lacks the column{'s' * (len(missing) > 1)} {quoted}. "
            f"It has: {', '.join(source.columns) or 'none'}. {_EXPECTED}"
        )
    assert images is not None

    def chat(raw: dict[str, Any]) -> dict[str, Any]:
        files = as_list(raw.get(images))
        if "messages" in columns:
            messages = _parsed(raw.get("messages"))
        else:
            prompt, reply = raw.get("prompt"), raw.get(answer or "")
            if isinstance(prompt, list) and isinstance(reply, list):
                messages = prompt + reply  # TRL's conversational prompt-completion form
            else:
                for name, text in (("prompt", prompt), (answer, reply)):
                    if not isinstance(text, str) or not text.strip():
                        raise DataError(f"{name}: {'empty' if not text else f'expected text, found {text!r:.60}'}")
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        return {"messages": normalise_messages(messages, len(files)), "images": files}

    def prompt(raw: dict[str, Any]) -> dict[str, Any]:
        files = as_list(raw.get(images))
        asked = _parsed(raw.get("messages")) if "messages" in columns else raw.get("prompt")
        if isinstance(asked, str) and asked.strip():
            asked = [{"role": "user", "content": asked}]
        right = raw.get(answer) if answer else None
        if isinstance(asked, list) and asked and isinstance(asked[-1], dict) and asked[-1].get("role") == "assistant":
            said, asked = asked[-1].get("content"), asked[:-1]
            right = _text(said) if right is None else right
        kept = {name: value for name, value in raw.items() if name not in ("messages", "prompt", answer, images)}
        kept = {name: value for name, value in kept.items() if _is_plain(value)}
        right = _text(right[-1].get("content")) if isinstance(right, list) and _is_chat(right) else right
        messages = normalise_messages(asked, len(files), answered=False)
        return {**kept, "messages": messages, "images": files, "answer": right}

    return chat if kind == "chat" else prompt


def _parsed(messages: Any) -> Any:
    if not isinstance(messages, str):
        return messages
    try:  # some datasets store the chat as JSON
        return json.loads(messages)
    except json.JSONDecodeError as error:
        raise DataError(f"messages: expected a list, found text that is not JSON ({error.msg})") from error


def _text(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def _is_chat(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, dict) and "content" in one for one in value)


def _is_plain(value: Any) -> bool:
    """Whether a column's value goes through JSON: images and bytes do not."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def undecoded(rows: Any, kind: Kind = "chat") -> Any:
    """Rows with images as files or bytes, never decoded by `datasets`, which would hide which one is broken."""
    if isinstance(rows, list):
        return rows
    datasets = import_datasets()
    if kind == "chat":
        rows = rows.select_columns([name for name in rows.column_names if name in _CHAT_COLUMNS])
    for name, feature in rows.features.items():
        plain = datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, plain)
        elif isinstance(feature, list) and isinstance(feature[0], datasets.Image):
            rows = rows.cast_column(name, [plain])
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(feature)(plain))
    return rows


def check_images(sample: dict[str, Any], folder: Path | None, decode: bool) -> None:
    """Resolve relative paths in place, and open what is to be opened."""
    for index, item in enumerate(sample["images"]):
        try:
            if isinstance(item, dict) and not item.get("bytes") and item.get("path"):
                item = item["path"]
            if isinstance(item, (str, Path)) and not is_base64(item):
                item = str(find_image(item, folder).resolve())
            if decode:
                open_image(item)
            sample["images"][index] = item
        except ImageError as error:
            raise DataError(f"images[{index}]: {error}") from error


def as_list(cell: Any) -> list[Any]:
    """A cell's images: none, one, or several."""
    if cell is None or cell == "":
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


def as_row(sample: dict[str, Any], row: int) -> dict[str, Any]:
    """A sample as a row of the trainer's dataset.

    Files are kept by their path; everything else by its place in the source, so that no image bytes are copied.
    Messages and other columns are JSON text, because Arrow would give every part every other part's keys, and chat
    templates ask for their presence.
    """
    cells = [
        {"path": item, "row": None, "index": None}
        if isinstance(item, str) and not is_base64(item)
        else {"path": None, "row": row, "index": index}
        for index, item in enumerate(sample["images"])
    ]
    columns = {name: value for name, value in sample.items() if name not in ("messages", "images")}
    return {"messages": json.dumps(sample["messages"]), "images": cells, "columns": json.dumps(columns)}


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset`, which is what TRL's trainers take, of what `as_row` made."""
    datasets = import_datasets()
    number, text = datasets.Value("int64"), datasets.Value("string")
    features = datasets.Features(
        {"messages": text, "images": [{"path": text, "row": number, "index": number}], "columns": text}
    )
    return datasets.Dataset.from_list(rows, features=features)


def read_sample(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row of `CheckedData.dataset`, ready for a processor: messages as lists of parts, images as PIL, other columns.

    Raises:
        ImageError: if a file has vanished or changed since it was checked.
    """
    images = []
    for cell in row["images"]:
        item = cell["path"]
        if item is None:
            raw = undecoded(source.rows)[cell["row"]]
            name = next(name for name in _IMAGES if name in raw)
            item = as_list(raw[name])[cell["index"]]
        images.append(open_image(item))
    return {**json.loads(row.get("columns") or "{}"), "messages": json.loads(row["messages"]), "images": images}
