"""Reading training data from wherever they are: files, folders, saved datasets, the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keepsight.data.conversations import DataError
from keepsight.errors import KeepsightError
from keepsight.installed import MissingExtraError

_TEXT_FILES = (".jsonl", ".json", ".csv")
_FILES = (*_TEXT_FILES, ".parquet")


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
        datasets = import_datasets()
        try:
            return _from_datasets(name, datasets.load_from_disk(str(folder)), split, folder)
        except KeepsightError:
            raise
        except IndexError as error:  # `datasets` writes no file where there are no rows, and then misses it
            raise DataError(f"{name} is empty: it holds no samples.") from error
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
            dataset = import_datasets().Dataset.from_parquet(str(path))
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
    datasets = import_datasets()
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


def import_datasets() -> Any:
    """The `datasets` library, or one line about the extra that brings it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("Training needs the `datasets` library.", "train") from error
    return datasets


def _some(names: Any, limit: int = 4) -> str:
    found: Sequence[str] = list(names)
    return ", ".join(found[:limit]) + (", ..." if len(found) > limit else "")


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' * (len(text) > 160)}"
