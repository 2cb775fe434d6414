"""From one data file to its rows: text in any encoding that says which it is, JSON, lines of JSON, CSV, Parquet."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.tables.foreign import what_to_do
from keepsight.data.tables.json_values import UnusableError, elements_of, value_of
from keepsight.data.tables.objects import samples_in
from keepsight.errors import KeepsightError
from keepsight.installed import MissingExtraError

_LINES, _TABLES = (".jsonl", ".ndjson"), (".csv", ".tsv")
SUFFIXES = (*_LINES, ".json", *_TABLES, ".parquet")
"""Of the data files that are read; the text files may be packed."""
_PACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}


@dataclass(frozen=True)
class Table:
    """Rows of a file.

    Attributes:
        rows: a list of dicts, or a `datasets.Dataset`.
        columns: their names, in order.
        lines: the line on which each row begins; None where a file has no lines.
        notes: what had to be decided to read it.
    """

    rows: Any
    columns: tuple[str, ...]
    lines: Sequence[int] | None = None
    notes: tuple[str, ...] = ()


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of its packing; None for what is no data file."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in _PACKED else path.suffix
    return suffix.lower() if suffix.lower() in SUFFIXES else None


def read_table(path: Path, name: str) -> Table:
    """The rows of one data file.

    Raises:
        DataError: naming the file and, where it has lines, the line that cannot be read.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{name} is {what_to_do(path)}. Data files end in {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty: it holds no samples.")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{name} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`.")
    if kind == ".parquet" and not head.startswith(b"PAR1"):
        raise DataError(f"{name} cannot be read: it is no Parquet file (it begins with {head[:8]!r}).")
    try:
        if kind == ".parquet":
            return of_dataset(import_datasets().Dataset.from_parquet(str(path)))
        text = _text(path, name)
        if kind in _TABLES:
            return _csv(text, name, "\t" if kind == ".tsv" else None)
        return _json(text, name, kind == ".json")
    except KeepsightError:
        raise
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{name} cannot be read ({short(error)}).") from error
    except Exception as error:  # pyarrow and datasets raise classes of their own for broken files
        if type(error).__module__.partition(".")[0] not in ("pyarrow", "datasets"):
            raise
        raise DataError(f"{name} cannot be read ({short(error)}). Is the file whole?") from error


def of_dataset(dataset: Any) -> Table:
    """A `datasets.Dataset`, images undecoded: `datasets` would not tell which one is broken."""
    for column, feature in dataset.features.items():
        plain = _undecoded(feature)
        if plain != feature:
            dataset = dataset.cast_column(column, plain)
    return Table(dataset, tuple(dataset.column_names))


def _undecoded(feature: Any) -> Any:
    datasets = import_datasets()
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({key: _undecoded(inner) for key, inner in feature.items()})
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    inner = getattr(feature, "feature", None)
    if inner is None or _undecoded(inner) == inner:
        return feature
    return type(feature)(_undecoded(inner), length=feature.length)


def import_datasets() -> Any:
    """The `datasets` library, or one line about the extra that brings it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("Training needs the `datasets` library.", "train") from error
    return datasets


def short(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' * (len(text) > 160)}"


def _text(path: Path, name: str) -> str:
    """A file's text: UTF-8, or what its first bytes show: Excel and PowerShell write UTF-16, with a mark or without."""
    content = path.read_bytes()
    unpack = _PACKED.get(path.suffix.lower())
    content = content if unpack is None else unpack(content)
    encoding = json.detect_encoding(content)
    try:
        return content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        western = "cp1252" if re.search(rb"[\x80-\x9f]", content) else "latin1"  # which differ in these
        raise DataError(
            f"{name}, line {line}: not {encoding.removesuffix('-sig').upper()} text (byte "
            f"0x{content[error.start]:02x}). Save the file as UTF-8; if it is western European: iconv -f {western} -t "
            f"utf-8 {path.name} > utf8-{path.name}"
        ) from error


def _json(text: str, name: str, whole: bool) -> Table:
    """One JSON value, or one a line; what a file is called does not decide which."""
    begins = text.lstrip()[:1]
    if begins == "[" or (whole and not _is_lines(text)):
        return _one_value(text, name)
    rows, numbers = [], []
    lines = text.split("\n" if "\n" in text else "\r")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(value_of(line))
        except json.JSONDecodeError as error:
            more = ""
            if _is_object(line.rstrip().removesuffix(",")):
                more = " A comma ends the line: JSON lines have none between objects."
            elif number == 1 and line.strip() in ("{", "["):
                more = " One object over several lines is .json; here each object is one line."
            elif number == last and number > 1:
                more = " The file seems to be cut off here."
            raise DataError(
                f"{name}, line {number}: not valid JSON ({error.msg} at column {error.colno}); expected one JSON "
                f"object per line{_begins(text) if number == 1 else ''}.{more}"
            ) from error
        except UnusableError as error:
            raise DataError(f"{name}, line {number}: {error}.") from error
        numbers.append(number)
    return _objects(rows, name, numbers)


def _begins(text: str) -> str:
    """How a file begins that is no JSON at all: a web page, for example."""
    begins = text.lstrip()[:24].split("\n")[0]
    return "" if begins[:1] in ("{", "[") else f"; it begins with {begins!r}"


def _is_object(text: str) -> bool:
    try:
        return isinstance(value_of(text), dict)
    except json.JSONDecodeError:
        return False
    except UnusableError:
        return text.startswith("{")


def _is_lines(text: str) -> bool:
    """Whether a .json file is in truth JSON lines: its first line is an object, and more follow."""
    first, _, rest = text.strip().partition("\n")
    return bool(rest.strip()) and _is_object(first)


def _one_value(text: str, name: str) -> Table:
    is_list = text.lstrip().startswith("[")
    elements: list[tuple[int, Any]] = []
    try:
        for element in elements_of(text) if is_list else [(1, value_of(text))]:
            elements.append(element)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}: not valid JSON ({error.msg}){_begins(text)}.") from error
    except UnusableError as error:
        place = f", row {len(elements)}" if is_list else ""
        raise DataError(f"{name}{place}: {error}.") from error
    if is_list:
        lines = [line for line, _ in elements]
        return _objects([row for _, row in elements], name, lines if len(set(lines)) == len(lines) else None)
    found = elements[0][1]
    if not isinstance(found, dict):
        raise DataError(f"{name} holds one JSON {type(found).__name__}; expected a list of samples.")
    rows, notes = samples_in(found, name)
    return _objects(rows, name, None, notes)


def _objects(rows: list[Any], name: str, lines: list[int] | None, notes: tuple[str, ...] = ()) -> Table:
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            where = f"row {number}" if lines is None else f"line {lines[number]}"
            raise DataError(f"{name}, {where}: expected an object with columns, found {type(row).__name__}.")
    return Table(rows, tuple(dict.fromkeys(key for row in rows for key in row)), lines, notes)


def _csv(text: str, name: str, delimiter: str | None) -> Table:
    """Rows under a header; separated by commas, or by what the header shows (semicolons, tabs)."""
    header, notes = text.split("\n", 1)[0], []
    if delimiter is None:
        delimiter = max(",;\t|", key=header.count) if header.count(",") == 0 else ","
        if delimiter != ",":
            notes.append("separated by " + {";": "semicolons", "\t": "tabs", "|": "vertical bars"}[delimiter])
    spaced = f"{delimiter} " in header  # Flickr30k; its spaces are no part of the cells
    rows, lines = [], []
    with _any_cell_size():
        reader = csv.DictReader(
            io.StringIO(text, newline=""),
            delimiter=delimiter,
            skipinitialspace=spaced and delimiter != "|",
            strict=True,
        )
        columns = tuple(name.strip() if spaced else name for name in reader.fieldnames or ())
        reader.fieldnames = columns
        twice = [column for column in columns if columns.count(column) > 1]
        if twice:
            raise DataError(f"{name}: the column {twice[0]!r} is there twice. Rename one.")
        begins = reader.line_num + 1
        try:
            for row in reader:
                if None in row or None in row.values():
                    found = len(row.get(None, ())) + sum(value is not None for key, value in row.items() if key)
                    raise DataError(
                        f"{name}, line {begins}: {found} cells under {len(columns)} columns. A cell with a comma or a "
                        'line break in it stands in quotes ("...").'
                    )
                rows.append({name: cell.strip() for name, cell in row.items()} if spaced else row)
                lines.append(begins)
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{name}, line {begins}: no valid CSV ({error}).") from error
    return Table(rows, columns, lines, tuple(notes))


@contextmanager
def _any_cell_size() -> Any:
    """The csv module refuses cells over 128 KiB, which is less than a picture; its limit is the whole process's."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
