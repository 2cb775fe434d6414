"""All that a check has found in a dataset, good and bad."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.rows import as_dataset
from keepsight.data.tables.reading import Source
from keepsight.words import counted

_SHOWN = 5


@dataclass(frozen=True)
class CheckedData:
    """All that was found in a dataset, good and bad; `good` before anything is trained on it.

    Attributes:
        source: what was read, and where images that are no files of their own are read from.
        kept: good samples, as rows of the trainer's dataset.
        formats: name of a format -> how many rows are of it.
        problems: (where, what is wrong) of every sample that cannot be used.
        hints: what to do about them, each once.
        skipped: (where, why) of every sample that was left out on purpose.
        told: subject -> (samples, words -> how often) of what is no fault: what is ignored, what was decided.
        image_counts: images per good sample.
        lengths: tokens of good samples after processing, before cutting, where they were measured.
        cut: samples whose answers training will cut.
        duplicates: samples that equal an earlier one, word for word and image for image.
    """

    source: Source
    kept: Any
    formats: dict[str, int]
    problems: tuple[tuple[str, str], ...] = ()
    hints: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    told: dict[str, tuple[int, Counter[str]]] = field(default_factory=dict)
    image_counts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    cut: int = 0
    duplicates: int = 0

    @property
    def rows(self) -> int:
        """How many good samples there are."""
        return len(self.kept)

    @property
    def text_only(self) -> int:
        """How many of them have no image."""
        return sum(count == 0 for count in self.image_counts)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest; None if lengths were not measured."""
        return max(self.lengths, default=None)

    @cached_property
    def dataset(self) -> Any:
        """A `datasets.Dataset` with the columns `messages`, `images` and `columns`, for `read_sample`."""
        return as_dataset(self.kept)

    def select(self, indices: Sequence[int]) -> CheckedData:
        """Some of the samples."""
        counts = tuple(self.image_counts[index] for index in indices)
        kept = [self.kept[index] for index in indices]
        return CheckedData(self.source, kept, self.formats, told=self.told, image_counts=counts)

    def mixed(self) -> CheckedData:
        """An epoch: itself, unless it is of several datasets with weights (`keepsight.data.mixing`)."""
        return self

    def mix(self, full: bool = True) -> str | None:
        """What share of an epoch each dataset has; None for one dataset."""
        return None

    def agreed(self) -> dict[str, Any]:
        """What a resumed run must find as it was."""
        return {"digest of the data": self.digest}

    def good(self) -> CheckedData:
        """Itself, if every sample can be used.

        Raises:
            DataError: one message for all problems found, naming row and column.
        """
        name, bad = self.source.name, [f"{where}, {what}" for where, what in self.problems]
        if bad:
            more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
            said = [f"{name} has {counted(len(bad), 'sample')} that cannot be used:", *bad[:_SHOWN], *more]
            text = f"{name}, {bad[0]}. " if len(bad) == 1 else "\n  ".join(said) + "\n"
            raise DataError(f"{text}{' '.join(self.hints)}".rstrip())
        if self.text_only == self.rows > 0:
            raise DataError(f"{name}: no sample has an image, so there is nothing that a visual memory could learn.")
        if not self.rows:
            raise DataError(f"{name}: no sample is left; all {len(self.skipped)} were skipped ({self.skipped[0][1]}).")
        return self

    def told_lines(self) -> list[tuple[str, str]]:
        """(subject, in words) of what was decided and what is ignored: the user must know, and nothing is wrong."""
        formats = ", ".join(
            f"{name}: {count:,}" if len(self.formats) > 1 else name for name, count in self.formats.items()
        )
        lines = [("format", formats or "none")] + [("read as", note) for note in self.source.notes]
        for subject, (samples, words) in self.told.items():
            shown = len(words) if subject == "ignored" else 8  # of all columns that are dropped, the names
            few = ", ".join(w if count == samples else f"{w} ({count:,})" for w, count in words.most_common(shown))
            more = f" and {len(words) - shown} more" if len(words) > shown else ""
            lines.append((subject, f"{few}{more}; in {counted(samples, 'sample')}"))
        return lines

    @property
    def digest(self) -> str:
        """Of the words, the other columns and the images' names, in order, so that a resumed run knows its data.

        Not of folders, so that data may move; and of images stored in the data only the place, as reading them is slow.
        """
        found = hashlib.blake2b(digest_size=8)
        for row in self.kept:
            images = [
                Path(cell["path"]).name if cell["path"] else [cell["row"], cell["index"]] for cell in row["images"]
            ]
            found.update(json.dumps([row["messages"], row["columns"], images]).encode())
        return found.hexdigest()
