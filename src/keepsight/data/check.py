"""Training data: conversations about images, read from anywhere and checked before a model is loaded.

Whatever the source looks like, a trainer gets the columns `messages`, in which every content is a list of parts
(`{"type": "image"}` or `{"type": "text", "text": ...}`), `images`, the images in the order of their parts, and, for
reinforcement learning, the source's other columns. Images stay files until the batch that needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from keepsight.data.errors import DataError
from keepsight.data.files import short
from keepsight.data.formats import IMAGES
from keepsight.data.guesses import UnknownFormatError, picture_columns
from keepsight.data.reading import Reading, Source, load_dataset_any
from keepsight.data.rows import as_dataset, as_row, check_images, read_sample
from keepsight.data.samples import Kind, sample_reader
from keepsight.errors import KeepsightError
from keepsight.words import counted

__all__ = [
    "CheckedData",
    "DataError",
    "Kind",
    "Policy",
    "Reading",
    "Source",
    "check_dataset",
    "load_dataset_any",
    "read_sample",
]

Policy = Literal["error", "skip", "keep"]
OverLong = Literal["error", "skip", "truncate"]
Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""

_SHOWN = 5


class Rehearse(Protocol):
    """What `rehearsal.Rehearsal` does: run a sample through a processor as training will."""

    def __call__(self, sample: dict[str, Any], images: list[Any] | None, /) -> Any: ...


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


def check_dataset(
    source: Source,
    *,
    kind: Kind = "chat",
    text_only: Policy = "error",
    decode: bool = True,
    rehearse: Rehearse | None = None,
    max_length: int | None = None,
    over_long: OverLong = "error",
    need_answer: bool = False,
    progress: Progress | None = None,
    extra: tuple[str, ...] = (),
) -> CheckedData:
    """Find every problem that training would meet hours later.

    Args:
        source: what `load_dataset_any` returned.
        kind: "chat" for supervised training, on the answers in the data; "prompt" for reinforcement learning, where
            the model answers: messages end with the user's, and other columns are kept for the rewards.
        text_only: what to do with a sample without images: it teaches a visual memory nothing.
        decode: read every image completely; otherwise only check that its file is there.
        rehearse: runs a sample through the model's processor (`rehearsal.Rehearsal`); needed for `max_length`. Its
            errors, of any class, are reported like the others.
        max_length: the longest sample, in tokens, that training will see.
        over_long: what to do with a longer one. "truncate" cuts the end of the answer, and is an error where that
            would cut image tokens or the whole answer.
        need_answer: with "prompt", a sample without an answer cannot be used.
        progress: called after every sample.
        extra: further columns that are used.

    Raises:
        DataError: if there are no samples, or no row is of a format that is known.
    """
    total = len(source.rows)
    if total == 0:
        raise DataError(f"{source.name} is empty: it holds no samples.")
    read, found = sample_reader(source, kind, extra), _Findings()
    for row, raw in enumerate(source.rows):
        where = source.where(row)
        try:
            one = read(raw)
            sample = one.sample
            found.formats[one.format] += 1
            images = check_images(sample, source.folders(row), decode)
            if need_answer and sample.get("answer") in (None, "", []):
                raise DataError("answer: empty; the reward compares with it")
            skip = _without_image(text_only, source) if not sample["images"] else None
            told: dict[str, tuple[str, ...]] = {}
            ignored, length = one.ignored, None
            if skip is None and rehearse is not None:
                heard = rehearse(sample, images)
                told, length, ignored = heard.told, heard.length, (*ignored, *heard.ignored)
                if length is not None and max_length is not None and length > max_length:
                    skip = _over_long(length, heard.needed, max_length, over_long)
                    found.cut += skip is None
            if skip is not None:
                found.skipped.append((where, skip))
            else:
                found.tell({**told, "decided": one.notes, "ignored": ignored})
                found.add(sample, row, length)
        except UnknownFormatError as error:
            if found.formats.total() == 0 and row == min(total, _SHOWN) - 1:
                raise  # it is the columns, not the row
            found.fail(where, error.in_row, error.hint)
        except KeepsightError as error:
            found.fail(where, str(error), getattr(error, "hint", ""))
            found.formats.update(filter(None, [getattr(error, "format", "")]))
        except Exception as error:  # of a processor, a template, a decoder: whose fault it is, the row is known
            found.fail(where, f"processing: training would stop here ({short(error)})", "")
        if progress is not None:
            progress(row + 1, total)
    return CheckedData(
        source,
        found.kept,
        dict(found.formats.most_common()),
        tuple(found.problems),
        tuple(hint for hint in found.hints if hint),
        tuple(found.skipped),
        found.told,
        tuple(found.images),
        tuple(found.lengths),
        found.cut,
        sum(found.seen.values()) - len(found.seen),
    )


class _Findings:
    """What is collected from sample to sample."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.formats: Counter[str] = Counter()
        self.problems: list[tuple[str, str]] = []
        self.hints: dict[str, None] = {}  # an ordered set
        self.skipped: list[tuple[str, str]] = []
        self.told: dict[str, tuple[int, Counter[str]]] = {}
        self.images: list[int] = []
        self.lengths: list[int] = []
        self.seen: Counter[bytes] = Counter()
        self.cut = 0

    def fail(self, where: str, what: str, hint: str) -> None:
        self.problems.append((where, what.rstrip(".")))
        self.hints[hint] = None

    def tell(self, told: dict[str, tuple[str, ...]]) -> None:
        for subject, words in told.items():
            if words:
                samples, counted = self.told.get(subject, (0, Counter[str]()))
                counted.update(dict.fromkeys(words, 1))
                self.told[subject] = (samples + 1, counted)

    def add(self, sample: dict[str, Any], row: int, length: int | None) -> None:
        self.kept.append(as_row(sample, row))
        self.images.append(len(sample["images"]))
        self.lengths += [] if length is None else [length]
        self.seen[_fingerprint(sample)] += 1


def _without_image(policy: Policy, source: Source) -> str | None:
    """Why to skip a sample without an image; None to keep it."""
    if policy == "error":
        raise DataError(
            "images: no image; a sample without one teaches the memory nothing",
            f"{without_images(source)}To leave samples without an image out: --text-only skip. To train on them all "
            "the same: --text-only keep.",
        )
    return "no image" if policy == "skip" else None


def without_images(source: Source) -> str:
    """What to write where no column is one of images; empty where one is."""
    names = (*IMAGES, *(ours for ours in source.reading.columns if ours.startswith("image")))
    if set(names) & set(source.columns):
        return ""
    guess = (picture_columns(source.rows[0]) if len(source.rows) else []) or ["COLUMN"]
    return (
        f"The data have no column of images ({', '.join(IMAGES[:4])}); if one is called otherwise: --columns "
        f"image={guess[0]}. They have: {', '.join(source.columns)}. "
    )


def _over_long(length: int, needed: int, limit: int, policy: OverLong) -> str | None:
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


def _fingerprint(sample: dict[str, Any]) -> bytes:
    """Of the words and the images: files by their path, stored images by their bytes."""
    digest = hashlib.blake2b(json.dumps(sample["messages"], sort_keys=True).encode(), digest_size=16)
    for item in sample["images"]:
        content: Any = item.get("bytes") if isinstance(item, dict) else item
        if hasattr(content, "tobytes"):
            content = content.tobytes()
        digest.update(content if isinstance(content, bytes) else str(content).encode())
    return digest.digest()
