"""Several datasets, each with its weight: as they are given, and read."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.tables.reading import Part, Reading, Rows, Source, load_dataset_any, reading_of


@dataclass(frozen=True)
class Mixture:
    """Datasets to be learned from together.

    Attributes:
        readings: the datasets.
        weights: what share of what is seen each of them gets, in any unit; None: every sample is seen once an epoch.
    """

    readings: tuple[Reading, ...]
    weights: tuple[float, ...] | None = None


def mixture_of(given: Any) -> Mixture:
    """What was given as a dataset, as a mixture: usually of one.

    Args:
        given: what `load_dataset_any` reads; a list of such, each alone or as (dataset, weight); or a `Mixture`.

    Raises:
        DataError: if only some have a weight, a weight is not above 0, or a dataset is named twice.
    """
    if isinstance(given, Mixture):
        return given
    if not isinstance(given, (list, tuple)):
        return Mixture((_reading(given),))
    pairs = [one if isinstance(one, tuple) and len(one) == 2 else (one, None) for one in given]
    readings = tuple(_reading(one) for one, _ in pairs)
    if not readings:
        raise DataError("There is no dataset in the list.")
    places = Counter(_place(one) for one in readings)
    twice = next((_called(one) for one in readings if places[_place(one)] > 1), None)
    if twice is not None:
        raise DataError(
            f"{twice} is named twice, so its samples would count twice. Name it once; in training, a weight shows them "
            f"more often: {twice}=2."
        )
    weights = {_called(reading): weight for reading, (_, weight) in zip(readings, pairs, strict=True)}
    without = [name for name, weight in weights.items() if weight is None]
    if len(without) == len(weights):
        return Mixture(readings)
    for name, weight in weights.items():
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if weight is not None and not (number and weight > 0 and math.isfinite(weight)):
            raise DataError(f"{name}={weight}: a weight is a number above 0. To do without a dataset, leave it out.")
    if without:
        raise DataError(
            f"{', '.join(without)}: no weight, and others have one. Give every dataset a weight ({without[0]}=1), or "
            "none of them: then every sample is seen once an epoch."
        )
    if len(weights) == 1:
        name = next(iter(weights))
        raise DataError(f"{name} has a weight and is the only dataset: a weight is beside others. Leave it out.")
    return Mixture(readings, tuple(float(weight) for weight in weights.values() if weight is not None))


def mixture_of_words(
    words: Sequence[str], columns: Sequence[str] = (), ignore: Sequence[str] = (), image_folder: Path | None = None
) -> Mixture:
    """Datasets as written on the command line: names, each with "=WEIGHT" behind it or without.

    Args:
        words: such as ["photos.jsonl=3", "charts.jsonl=1"].
        columns, ignore, image_folder: see `reading_of`; of all of them.

    Raises:
        DataError: for a weight that is no number; otherwise as `mixture_of`.
    """
    return mixture_of([(reading_of(name, columns, ignore, image_folder), w) for name, w in map(_weighted, words)])


def for_evaluation(given: Any) -> Mixture:
    """The same for evaluation, which sees every sample once.

    Raises:
        DataError: if there are weights.
    """
    mixture = mixture_of(given)
    if mixture.weights is not None:
        raise DataError("Evaluation sees every sample once, so weights have no effect there. Leave them out.")
    return mixture


def load_sources(given: Any, split: str = "train") -> tuple[list[Source], tuple[float, ...] | None]:
    """(the datasets of a mixture, read; their weights).

    What is said of columns holds for every dataset that has them.

    Raises:
        FileNotFoundError, DataError: as `load_dataset_any`; or if no dataset has a column that was named.
    """
    mixture = mixture_of(given)
    sources = [load_dataset_any(reading, split) for reading in mixture.readings]
    if len(sources) == 1:
        return sources, mixture.weights
    pairs = dict.fromkeys(pair for source in sources for pair in source.reading.columns.items())
    has = {pair: [set(pair[1].split("+")) <= set(source.columns) for source in sources] for pair in pairs}
    for (ours, theirs), having in has.items():
        if not any(having):
            names = "; ".join(f"{source.name} has {', '.join(source.columns)}" for source in sources)
            raise DataError(f"--columns {ours}={theirs}: no dataset has a column {theirs!r}. {names}.")
    kept = [
        {pair[0]: pair[1] for pair in source.reading.columns.items() if has[pair][place]}
        for place, source in enumerate(sources)
    ]
    read = [replace(one, reading=replace(one.reading, columns=own)) for one, own in zip(sources, kept, strict=True)]
    return read, mixture.weights


@dataclass(frozen=True)
class Together(Source):
    """Rows of several sources, one source after the other, each read as it was said of it.

    Attributes:
        members: the sources.
    """

    members: tuple[Source, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Source]) -> Together:
        """All of them."""
        rows, parts = Rows([one.rows for one in members]), []
        for one, start in zip(members, rows.starts, strict=True):
            names = [f"{one.name}, {part.name}" if part.name else one.name for part in one.parts]
            found = zip(names, one.parts, strict=True)
            parts += [Part(name, start + part.start, part.lines, part.folders) for name, part in found]
        columns = tuple(dict.fromkeys(name for one in members for name in one.columns))
        notes = tuple(f"{one.name}: {note}" for one in members for note in one.notes)
        return cls(f"{len(members)} datasets", rows, columns, tuple(parts), notes=notes, members=tuple(members))

    @property
    def starts(self) -> list[int]:
        """The row with which each begins."""
        return self.rows.starts

    def at(self, row: int) -> tuple[dict[str, Any], Source]:
        """A row, and the source that it is of."""
        place = bisect.bisect_right(self.starts, row) - 1
        return self.members[place].at(row - self.starts[place])


def _weighted(word: str) -> tuple[str, float | None]:
    """(dataset, weight) of "NAME=WEIGHT"; a name may hold the sign itself."""
    name, equals, number = word.rpartition("=")
    if not equals or Path(word).expanduser().exists():
        return word, None
    try:
        return name, float(number)
    except ValueError as error:
        if Path(name).expanduser().exists():
            raise DataError(
                f"--data {word}: {number!r} is no weight. A weight is a number above 0: {name}=0.5."
            ) from error
        return word, None


def _reading(given: Any) -> Reading:
    if isinstance(given, Reading):
        return given
    if not isinstance(given, (str, Path)) and not hasattr(given, "column_names"):
        raise DataError(
            f"{given!r:.60} is no dataset: expected a file, a folder, a hub id or a datasets.Dataset; or a list of "
            "these, each alone or as (dataset, weight)."
        )
    return Reading(given)


def _called(reading: Reading) -> str:
    """A dataset's name; of one that has none, its identity."""
    return str(reading.source) if isinstance(reading.source, (str, Path)) else f"dataset {id(reading.source)}"


def _place(reading: Reading) -> str:
    """The same, of a file that has several names one for all."""
    name = _called(reading)
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
