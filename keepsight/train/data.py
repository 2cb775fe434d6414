"""Training data: conversations about images, read from anywhere and checked before a model is loaded.

Whatever the source looks like, the trainer gets two columns: `messages`, in which every content is a list of parts
(`{"type": "image"}` or `{"type": "text", "text": ...}`) and the last message is the assistant's; and `images`, the
images in the order of their parts. Images stay files until the batch that needs them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keepsight.errors import KeepsightError
from keepsight.train.images import ImageError, find_image, open_image

Policy = Literal["error", "skip", "keep"]
Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""

_TEXT_FILES = (".jsonl", ".json", ".csv")
_FILES = (*_TEXT_FILES, ".parquet")
_IMAGES = ("images", "image", "file_names", "file_name")
_COLUMNS = ("messages", "prompt", "answer", "completion", *_IMAGES)
_ROLES = ("system", "user", "assistant")
_PLACEHOLDER = "<image>"
_EXPECTED = (
    """Expected columns: "messages" (a chat) and "images" (a list of files), or "prompt", "answer" and "image"."""
)
_SHOWN = 5


class DataError(KeepsightError):
    """The training data cannot be used as they are.

    Args:
        message: what is wrong.
        hint: what to do about it, said once however many samples have the same problem.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Source:
    """Rows as found, before any check.

    Attributes:
        name: what the user called it.
        rows: a sequence of dicts: a list, or a `datasets.Dataset`.
        columns: their names.
        folder: what relative image paths are relative to.
        first_line: for text files, the line number of row 0, so that messages can name lines.
    """

    name: str
    rows: Any
    columns: tuple[str, ...]
    folder: Path | None = None
    first_line: int | None = None

    def where(self, row: int) -> str:
        """How to find a row: "line 3" of a text file, else "row 2" (counted from 0)."""
        return f"row {row}" if self.first_line is None else f"line {row + self.first_line}"


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


# ------------------------------------------------------------------------------------------------------------- reading


def load_dataset_any(source: Any, split: str = "train") -> Source:
    """Read a dataset from wherever it is.

    Args:
        source: a .jsonl, .json, .csv or .parquet file; a folder written by `Dataset.save_to_disk`; a folder of images
            with metadata.jsonl (or .csv, .parquet); a folder with one data file; a dataset id on the Hugging Face hub;
            or a `datasets.Dataset`.
        split: which split, where there are several.

    Raises:
        FileNotFoundError: if there is nothing under that name.
        DataError: if it cannot be read.
    """
    if hasattr(source, "column_names"):
        return _from_datasets("the dataset", source, split)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, path.parent, str(source))
    if path.is_dir():
        return _read_folder(path, split, str(source))
    if path.suffix in _FILES or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"{source}: no such file or folder.")
    return _read_hub(str(source), split)


def _read_folder(folder: Path, split: str, name: str) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        datasets = _datasets()
        try:
            return _from_datasets(name, datasets.load_from_disk(str(folder)), split, folder)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{name}: a dataset folder that cannot be read ({_short(error)}).") from error
    found = [path for suffix in _FILES for path in [folder / f"metadata{suffix}"] if path.is_file()]
    found = found or sorted(path for path in folder.iterdir() if path.suffix in _FILES and path.is_file())
    if not found and (folder / split).is_dir():
        return _read_folder(folder / split, split, f"{name}/{split}")
    named = [path for path in found if path.stem == split]
    if len(named or found) == 1:
        return _read_file((named or found)[0], folder, str((named or found)[0]))
    if found:
        raise DataError(
            f"{name} holds {len(found)} data files ({_some(path.name for path in found)}); name one of them."
        )
    raise DataError(
        f"{name} holds no dataset: neither what Dataset.save_to_disk writes, nor metadata.jsonl beside images, nor a "
        f"{', '.join(_FILES)} file."
    )


def _read_file(path: Path, folder: Path, name: str) -> Source:
    if path.suffix not in _FILES:
        raise DataError(f"{name}: a data file is one of {', '.join(_FILES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty: it holds no samples.")
    try:
        if path.suffix == ".parquet":
            dataset = _datasets().Dataset.from_parquet(str(path))
            return Source(name, dataset, tuple(dataset.column_names), folder)
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
            return Source(name, rows, tuple(reader.fieldnames or ()), folder, 2)
        return _read_json(path, folder, name)
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except KeepsightError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read ({_short(error)}).") from error
    except Exception as error:  # pyarrow and datasets raise classes of their own for broken files
        if type(error).__module__.partition(".")[0] not in ("pyarrow", "datasets"):
            raise
        raise DataError(f"{name} cannot be read ({_short(error)}). Is the file whole?") from error


def _read_json(path: Path, folder: Path, name: str) -> Source:
    text = path.read_text(encoding="utf-8-sig")
    first_line: int | None = 1
    if path.suffix == ".json" or text.lstrip().startswith("["):
        try:
            rows, first_line = json.loads(text), None
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}).") from error
        if not isinstance(rows, list):
            raise DataError(f"{name} holds one JSON {type(rows).__name__}; expected a list of samples.")
    else:
        rows = []
        lines = text.rstrip().split("\n")
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                what = "an empty line" if not line.strip() else f"not valid JSON ({error.msg} at column {error.colno})"
                cut = " The file seems to be cut off here." if number == len(lines) and number > 1 else ""
                raise DataError(f"{name}, line {number}: {what}; expected one JSON object per line.{cut}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            where = f"row {number}" if first_line is None else f"line {number + 1}"
            raise DataError(f"{name}, {where}: expected an object with columns, found {type(row).__name__}.")
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Source(name, rows, columns, folder, first_line)


def _read_hub(name: str, split: str) -> Source:
    datasets = _datasets()
    try:
        return _from_datasets(name, datasets.load_dataset(name, split=split), split)
    except KeepsightError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: no such file or folder here, and it cannot be loaded from the Hugging Face hub "
            f"(split {split!r}; {_short(error)})."
        ) from error


def _from_datasets(name: str, dataset: Any, split: str, folder: Path | None = None) -> Source:
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{name} has no split {split!r}. It has: {', '.join(dataset)}.")
        dataset = dataset[split]
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{name} is a streamed dataset; checks and resuming need one of known length.")
    return Source(name, dataset, tuple(dataset.column_names), folder)


# ------------------------------------------------------------------------------------------------------------ checking


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


def normalise_messages(messages: Any, num_images: int) -> list[dict[str, Any]]:
    """A chat in which every content is a list of parts, with one image part per image.

    Contents that are plain text may mark images by `<image>`; without any mark, the images stand before the text of the
    first user message.

    Args:
        messages: list of {"role", "content"}; content is text or a list of parts.
        num_images: how many images the sample has.

    Raises:
        DataError: naming the message, if the chat has no such form.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages: {'empty' if not messages else f'expected a list, found {messages!r:.60}'}")
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f'messages[{index}]: expected {{"role": ..., "content": ...}}, found {message!r:.60}')
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise DataError(f"messages[{index}]: role {role!r}; expected one of {', '.join(_ROLES)}")
        result.append({"role": role, "content": list(_parts(content, index))})
    if result[-1]["role"] != "assistant":
        raise DataError(
            f"messages: the last message is the {result[-1]['role']}'s; it must be the assistant's, whose words are "
            "what training teaches"
        )
    for index, message in enumerate(result):
        if message["role"] == "assistant":
            if any(part["type"] == "image" for part in message["content"]):
                raise DataError(f"messages[{index}]: an image in the assistant's message; models answer in text")
            if not any(part["text"].strip() for part in message["content"]):
                raise DataError(f"messages[{index}]: the assistant's message is empty")
    marks = sum(part["type"] == "image" for message in result for part in message["content"])
    first_user = next((message for message in result if message["role"] == "user"), None)
    if marks == 0 and num_images and first_user is not None and all(isinstance(m["content"], str) for m in messages):
        first_user["content"][:0] = [{"type": "image"}] * num_images
        marks = num_images
    if marks != num_images:
        raise DataError(
            f"messages: {marks} image placeholder{'s' * (marks != 1)} for {num_images} "
            f'image{"s" * (num_images != 1)}; each image needs one part {{"type": "image"}} in a user message'
        )
    return result


def _parts(content: Any, index: int) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        pieces = content.split(_PLACEHOLDER)
        for number, piece in enumerate(pieces):
            if number:
                yield {"type": "image"}
            text = piece.strip() if len(pieces) > 1 else piece
            if text:
                yield {"type": "text", "text": text}
        return
    if not isinstance(content, (list, tuple)):
        raise DataError(f"messages[{index}]: content must be text or a list of parts, found {content!r:.60}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}
        elif kind == "image":
            if any(part.get(key) is not None for key in ("image", "url", "path", "base64")):
                raise DataError(
                    f'messages[{index}]: an image inside the message; put it in the column "images" and leave '
                    '{"type": "image"} here'
                )
            yield {"type": "image"}
        else:
            raise DataError(
                f'messages[{index}]: expected parts {{"type": "text", "text": ...}} or {{"type": "image"}}, '
                f"found {part!r:.60}"
            )


def _undecoded(rows: Any) -> Any:
    """Rows with images as files or bytes, never decoded by `datasets`, which would hide which one is broken."""
    if isinstance(rows, list):
        return rows
    datasets = _datasets()
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
    datasets = _datasets()
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


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            'Training needs the `datasets` library. Install it: pip install "keepsight[train]"'
        ) from error
    return datasets


def _some(names: Any, limit: int = 4) -> str:
    found: Sequence[str] = list(names)
    return ", ".join(found[:limit]) + (", ..." if len(found) > limit else "")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' * (len(text) > 160)}"
