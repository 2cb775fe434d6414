"""Reading data from wherever they are: files, folders of shards, folders of images, saved datasets, the hub."""

from __future__ import annotations

import bisect
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.tables.files import SUFFIXES, Table, import_datasets, kind_of, of_dataset, read_table, short
from keepsight.data.tables.layout import data_files
from keepsight.errors import KeepsightError
from keepsight.words import some


@dataclass(frozen=True)
class Reading:
    """A dataset, and how it is to be read where it does not say so itself.

    Attributes:
        source: see `load_dataset_any`.
        columns: our name of a column -> the dataset's.
        ignore: columns, and keys of messages, that are not to be used.
        image_folder: what relative image paths are relative to; default: the data file's folder.
    """

    source: Any
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    image_folder: Path | None = None


@dataclass(frozen=True)
class Part:
    """Rows of a source that come from one file.

    Attributes:
        name: the file's; empty where there is one only.
        start: the first of the rows.
        lines: see `files.Table`.
        folders: what relative image paths may be relative to, in this order.
    """

    name: str = ""
    start: int = 0
    lines: Sequence[int] | None = None
    folders: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Source:
    """Rows as found, before any check.

    Attributes:
        name: what the user called it.
        rows: a sequence of dicts: a list, or a `datasets.Dataset` with its images undecoded.
        columns: their names.
        parts: the files they come from, in order.
        reading: how they are to be read.
        notes: what reading had to decide.
    """

    name: str
    rows: Any
    columns: tuple[str, ...]
    parts: tuple[Part, ...] = (Part(),)
    reading: Reading = field(default_factory=lambda: Reading(None))
    notes: tuple[str, ...] = ()

    def where(self, row: int) -> str:
        """How to find a row: "line 3" of a text file, else "row 2" (from 0). Of several files, with the file."""
        part = self._part(row)
        inside = row - part.start
        place = f"row {inside}" if part.lines is None else f"line {part.lines[inside]}"
        return f"{part.name}, {place}" if part.name else place

    def folders(self, row: int) -> tuple[Path, ...]:
        """What the row's relative image paths may be relative to."""
        given = self.reading.image_folder
        return self._part(row).folders if given is None else (given,)

    def at(self, row: int) -> tuple[dict[str, Any], Source]:
        """A row, and the source that says how it is read."""
        return self.rows[row], self

    def _part(self, row: int) -> Part:
        return self.parts[bisect.bisect_right(self.parts, row, key=lambda part: part.start) - 1]


def load_dataset_any(source: Any, split: str = "train") -> Source:
    """Read a dataset from wherever it is.

    Args:
        source: a data file (`files.SUFFIXES`; text files also packed by gzip, bzip2 or xz); a folder written by
            `Dataset.save_to_disk`; a folder of images with a metadata file; a folder as the hub lays it out, with
            shards and splits; a dataset id on the hub; a `datasets.Dataset`; or a `Reading` of any of these.
        split: which split, where there are several.

    Raises:
        FileNotFoundError: if there is nothing under that name.
        DataError: if it cannot be read.
    """
    reading = source if isinstance(source, Reading) else Reading(source)
    source = reading.source
    if hasattr(source, "column_names"):
        return _of_dataset("the dataset", source, split, reading)
    path = Path(source).expanduser()
    if path.is_file():
        return _of_files(str(source), [path], (path.parent,), reading)
    if path.is_dir():
        return _of_folder(str(source), path, split, reading)
    if kind_of(path) or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        there = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, 1)
        meant = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"{source}: no such file or folder.{meant}")
    return _of_hub(str(source), split, reading)


def _of_folder(name: str, folder: Path, split: str, reading: Reading) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        datasets = import_datasets()
        try:
            return _of_dataset(name, datasets.load_from_disk(str(folder)), split, reading, folder)
        except KeepsightError:
            raise
        except IndexError as error:  # `datasets` writes no file where there are no rows, and then misses it
            raise DataError(f"{name} is empty: it holds no samples.") from error
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{name}: a dataset folder that cannot be read ({short(error)}).") from error
    files, notes = data_files(folder, split, name)
    return _of_files(name if len(files) > 1 else str(files[0]), files, (folder,), reading, notes)


def _of_files(
    name: str, files: list[Path], folders: tuple[Path, ...], reading: Reading, decided: tuple[str, ...] = ()
) -> Source:
    """Shards, one after the other. Images are looked for beside each, then in the folder that was named."""
    tables: list[Table] = []
    parts: list[Part] = []
    start = 0
    for path in files:
        table = read_table(path, str(path) if len(files) > 1 else name)
        tables.append(table)
        shard = path.relative_to(folders[0]).as_posix() if len(files) > 1 else ""
        parts.append(Part(shard, start, table.lines, tuple(dict.fromkeys((path.parent, *folders)))))
        start += len(table.rows)
    columns = tuple(dict.fromkeys(column for table in tables for column in table.columns))
    notes = tuple(dict.fromkeys((*decided, *(note for table in tables for note in table.notes))))
    if len(files) > 1:
        notes = (f"{len(files)} files: {some(part.name for part in parts)}", *notes)
    return Source(name, _together([table.rows for table in tables]), columns, tuple(parts), reading, notes)


def _together(rows: list[Any]) -> Any:
    if len(rows) == 1:
        return rows[0]
    if all(isinstance(one, list) for one in rows):
        return [row for one in rows for row in one]
    if not any(isinstance(one, list) for one in rows):
        datasets = import_datasets()
        if all(one.features == rows[0].features for one in rows):
            return datasets.concatenate_datasets(rows)
    return Rows(rows)


class Rows(Sequence):
    """Rows of several tables, one table after the other.

    Attributes:
        starts: the row with which each table begins.
    """

    def __init__(self, tables: list[Any]):
        *self.starts, self._length = accumulate((len(table) for table in tables), initial=0)
        self._tables = tables

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        table = bisect.bisect_right(self.starts, row) - 1
        return self._tables[table][row - self.starts[table]]


def _of_hub(name: str, split: str, reading: Reading) -> Source:
    datasets = import_datasets()
    try:
        return _of_dataset(name, datasets.load_dataset(name, split=split), split, reading)
    except KeepsightError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: no such file or folder here, and it cannot be loaded from the Hugging Face hub "
            f"(split {split!r}; {short(error)}). Files end in {', '.join(SUFFIXES)}."
        ) from error


def _of_dataset(name: str, dataset: Any, split: str, reading: Reading, folder: Path | None = None) -> Source:
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{name} has no split {split!r}. It has: {', '.join(dataset)}.")
        dataset = dataset[split]
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{name} is a streamed dataset; checks and resuming need one of known length.")
    table = of_dataset(dataset)
    return Source(name, table.rows, table.columns, (Part(folders=() if folder is None else (folder,)),), reading)


COLUMNS_HELP = "Your name of a column: question=query, image=photo, ...; repeat for several (see docs/data.md)."
IGNORE_HELP = "A column, or a key of messages, that is not to be used; repeat for several."
IMAGE_FOLDER_HELP = "What relative image paths are relative to. Default: the data file's folder."


def reading_of(
    source: str, columns: Sequence[str] = (), ignore: Sequence[str] = (), image_folder: Path | None = None
) -> Reading:
    """What the command line says of a dataset: `question=query` for a column (several with commas), names to ignore.

    Raises:
        DataError: for what says nothing.
    """
    found = {}
    for pair in (pair for one in columns for pair in re.split(r",\s*", one) if pair.strip()):
        ours, equals, theirs = (word.strip() for word in pair.partition("="))
        if not (ours and equals and theirs):
            raise DataError(f"--columns {pair}: expected OURS=THEIRS, such as question=query.")
        found[ours] = theirs
    if image_folder is not None and not image_folder.expanduser().is_dir():
        raise DataError(f"--image-folder {image_folder}: no such folder.")
    names = tuple(name for one in ignore for name in re.split(r",\s*", one) if name)
    return Reading(source, found, names, None if image_folder is None else image_folder.expanduser())
