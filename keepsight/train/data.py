"""Training data: conversations about images, read from anywhere and checked before a model is loaded.

Whatever the source looks like, the trainer gets two columns: `messages`, in which every content is a list of parts
(`{"type": "image"}` or `{"type": "text", "text": ...}`) and the last message is the assistant's; and `images`, the
images in the order of their parts. Images stay files until the batch that needs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keepsight.errors import KeepsightError
from keepsight.train.conversations import DataError, normalise_messages
from keepsight.train.images import ImageError, find_image, open_image
from keepsight.train.reading import Source, import_datasets, load_dataset_any

__all__ = [
    "CheckedData",
    "DataError",
    "Policy",
    "Source",
    "check_dataset",
    "load_dataset_any",
    "normalise_messages",
    "read_sample",
]

Policy = Literal["error", "skip", "keep"]
Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""

_IMAGES = ("images", "image", "file_names", "file_name")
_COLUMNS = ("messages", "prompt", "answer", "completion", *_IMAGES)
_EXPECTED = (
    """Expected columns: "messages" (a chat) and "images" (a list of files), or "prompt", "answer" and "image"."""
)
_SHOWN = 5


@dataclass(frozen=True)
class CheckedData:
    """Data that passed every check.

    Attributes:
        dataset: a `datasets.Dataset` with the columns `messages` and `images`, for `read_sample`.
        source: where images that are no files of their own are read from.
        rows: how many samples.
        skipped: (where, why) of every sample that was left out.
        text_only: samples without an image that were kept.
        longest: tokens of the longest sample after processing, before cutting; None if lengths were not measured.
        cut: samples whose answers training will cut.
    """

    dataset: Any
    source: Source
    rows: int
    skipped: tuple[tuple[str, str], ...] = ()
    text_only: int = 0
    longest: int | None = None
    cut: int = 0


def check_dataset(
    source: Source,
    *,
    text_only: Policy = "error",
    decode: bool = True,
    measure: Callable[[dict[str, Any]], tuple[int, int]] | None = None,
    max_length: int | None = None,
    over_long: Literal["error", "skip", "truncate"] = "error",
    progress: Progress | None = None,
) -> CheckedData:
    """Find every problem that training would meet hours later.

    Args:
        source: what `load_dataset_any` returned.
        text_only: what to do with a sample without images: it teaches a visual memory nothing.
        decode: read every image completely; otherwise only check that its file is there.
        measure: sample -> (tokens after processing, tokens up to the last image or the start of the first answer,
            whichever is later); needed for `max_length`. Its own errors are reported like the others.
        max_length: the longest sample, in tokens, that training will see.
        over_long: what to do with a longer one. "truncate" cuts the end of the answer, and is an error where that
            would cut image tokens or the whole answer.
        progress: called after every sample.

    Raises:
        DataError: one message for all problems found, naming row and column.
    """
    if len(source.rows) == 0:
        raise DataError(f"{source.name} is empty: it holds no samples.")
    to_sample = _reader(source)
    samples: list[dict[str, Any]] = []
    problems: list[str] = []
    hints: dict[str, None] = {}  # an ordered set
    skipped: list[tuple[str, str]] = []
    kept_text_only, longest, cut = 0, 0, 0
    for row, raw in enumerate(_undecoded(source.rows)):
        where = source.where(row)
        try:
            sample = to_sample(raw)
            _check_images(sample, source.folder, decode)
            skip = None
            if not sample["images"]:
                if text_only == "error":
                    raise DataError(
                        "images: no image; a sample without one teaches the memory nothing",
                        "To leave samples without an image out: --text-only skip. To train on them all the same: "
                        "--text-only keep.",
                    )
                skip = "no image" if text_only == "skip" else None
                kept_text_only += text_only == "keep"
            if skip is None and measure is not None:
                length, needed = measure(sample)
                if max_length is not None and length > max_length:
                    skip = _over_long(length, needed, max_length, over_long)
                    cut += skip is None
                longest = max(longest, length) if skip is None else longest
            if skip is None:
                samples.append({"messages": json.dumps(sample["messages"]), "images": _cells(sample["images"], row)})
            else:
                skipped.append((where, skip))
        except KeepsightError as error:
            problems.append(f"{where}, {error}")
            hints[getattr(error, "hint", "")] = None
        if progress is not None:
            progress(row + 1, len(source.rows))
    _report(source, problems, " ".join(hint for hint in hints if hint))
    if kept_text_only == len(samples) > 0:
        raise DataError(f"{source.name}: no sample has an image, so there is nothing that a visual memory could learn.")
    if not samples:
        raise DataError(f"{source.name}: no sample is left; all {len(skipped)} were skipped ({skipped[0][1]}).")
    longest_seen = longest if max_length is not None else None
    return CheckedData(_as_dataset(samples), source, len(samples), tuple(skipped), kept_text_only, longest_seen, cut)


def _over_long(length: int, needed: int, limit: int, policy: str) -> str | None:
    """Why to skip a sample longer than `limit`; None to keep (and cut) it."""
    if policy == "skip":
        return f"{length} tokens, over the limit of {limit}"
    if policy == "truncate" and needed < limit:
        return None
    if needed >= limit:
        raise DataError(
            f"messages: {length} tokens after processing; the images and the question alone fill the {limit} tokens of "
            "--max-length",
            "Raise --max-length, make images smaller, or leave longer samples out: --over-long skip.",
        )
    raise DataError(
        f"messages: {length} tokens after processing, over the {limit} of --max-length",
        "Raise --max-length, cut the ends of answers (--over-long truncate), or leave such samples out (--over-long "
        "skip).",
    )


def _report(source: Source, problems: list[str], hint: str) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise DataError(f"{source.name}, {problems[0].rstrip('.')}. {hint}".rstrip())
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    lines = [*(problem.rstrip(".") for problem in problems[:_SHOWN]), *more]
    text = f"{source.name} has {len(problems)} samples that cannot be used:\n  " + "\n  ".join(lines)
    raise DataError(f"{text}\n{hint}".rstrip())


def _reader(source: Source) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """How to turn a raw row into {"messages", "images"}, judged by the columns; refuses what has no reading."""
    columns = set(source.columns)
    images = next((name for name in _IMAGES if name in columns), None)
    if "messages" in columns:
        missing = [] if images else ["images"]
    elif columns & {"prompt", "answer", "completion"}:
        answer = next((name for name in ("answer", "completion") if name in columns), None)
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

    def read(raw: dict[str, Any]) -> dict[str, Any]:
        files = _as_list(raw.get(images))
        if "messages" in columns:
            messages = raw.get("messages")
            if isinstance(messages, str):  # some datasets store the chat as JSON
                try:
                    messages = json.loads(messages)
                except json.JSONDecodeError as error:
                    raise DataError(f"messages: expected a list, found text that is not JSON ({error.msg})") from error
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

    return read


def _undecoded(rows: Any) -> Any:
    """Rows with images as files or bytes, never decoded by `datasets`, which would hide which one is broken."""
    if isinstance(rows, list):
        return rows
    datasets = import_datasets()
    rows = rows.select_columns([name for name in rows.column_names if name in _COLUMNS])
    for name, feature in rows.features.items():
        plain = datasets.Image(decode=False)
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, plain)
        elif isinstance(feature, list) and isinstance(feature[0], datasets.Image):
            rows = rows.cast_column(name, [plain])
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            rows = rows.cast_column(name, type(feature)(plain))
    return rows


def _check_images(sample: dict[str, Any], folder: Path | None, decode: bool) -> None:
    """Resolve relative paths in place, and open what is to be opened."""
    for index, item in enumerate(sample["images"]):
        try:
            if isinstance(item, dict) and not item.get("bytes") and item.get("path"):
                item = item["path"]
            if isinstance(item, (str, Path)):
                item = str(find_image(item, folder).resolve())
            if decode:
                open_image(item)
            sample["images"][index] = item
        except ImageError as error:
            raise DataError(f"images[{index}]: {error}") from error


def _as_list(cell: Any) -> list[Any]:
    if cell is None or cell == "":
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


def _cells(images: list[Any], row: int) -> list[dict[str, Any]]:
    """Files by their path; everything else by its place in the source, so that no image bytes are copied."""
    return [
        {"path": item, "row": None, "index": None}
        if isinstance(item, str)
        else {"path": None, "row": row, "index": index}
        for index, item in enumerate(images)
    ]


def _as_dataset(samples: list[dict[str, Any]]) -> Any:
    """A `datasets.Dataset`, which is what TRL's trainer takes.

    Messages are JSON text, because Arrow would give every part every other part's keys, and chat templates ask for
    their presence.
    """
    datasets = import_datasets()
    number, text = datasets.Value("int64"), datasets.Value("string")
    features = datasets.Features({"messages": text, "images": [{"path": text, "row": number, "index": number}]})
    return datasets.Dataset.from_list(samples, features=features)


def read_sample(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row of `CheckedData.dataset`, ready for a processor: messages as lists of parts, images as PIL.

    Raises:
        ImageError: if a file has vanished or changed since it was checked.
    """
    images = []
    for cell in row["images"]:
        item = cell["path"]
        if item is None:
            raw = _undecoded(source.rows)[cell["row"]]
            name = next(name for name in _IMAGES if name in raw)
            item = _as_list(raw[name])[cell["index"]]
        images.append(open_image(item))
    return {"messages": json.loads(row["messages"]), "images": images}
