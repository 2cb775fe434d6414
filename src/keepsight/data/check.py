"""Training data: conversations about images, read from anywhere and checked before a model is loaded.

Whatever the source looks like, a trainer gets the columns `messages`, in which every content is a list of parts
(`{"type": "image"}` or `{"type": "text", "text": ...}`), `images`, the images in the order of their parts, and, for
reinforcement learning, the source's other columns. Images stay files until the batch that needs them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from keepsight.data.checked import CheckedData
from keepsight.data.errors import DataError
from keepsight.data.formats import IMAGES
from keepsight.data.guesses import UnknownFormatError, picture_columns
from keepsight.data.rehearsal import Rehearsal
from keepsight.data.rows import as_row, check_images, read_sample
from keepsight.data.samples import Kind, sample_reader
from keepsight.data.tables.files import short
from keepsight.data.tables.reading import Reading, Source, load_dataset_any
from keepsight.errors import KeepsightError

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

_ENOUGH = 5  # rows of no format that is known, after which it is the columns


def check_dataset(
    source: Source,
    *,
    kind: Kind = "chat",
    text_only: Policy = "error",
    decode: bool = True,
    rehearse: Rehearsal | None = None,
    max_length: int | None = None,
    over_long: OverLong = "error",
    need_answer: bool = False,
    progress: Progress | None = None,
) -> CheckedData:
    """Find every problem that training would meet hours later.

    Args:
        source: what `load_dataset_any` returned.
        kind: "chat" for supervised training, on the answers in the data; "prompt" for reinforcement learning, where
            the model answers: messages end with the user's, and other columns are kept for the rewards.
        text_only: what to do with a sample without images: it teaches a visual memory nothing.
        decode: read every image completely; otherwise only check that its file is there.
        rehearse: runs a sample through the model's processor; needed for `max_length`. Its
            errors, of any class, are reported like the others.
        max_length: the longest sample, in tokens, that training will see.
        over_long: what to do with a longer one. "truncate" cuts the end of the answer, and is an error where that
            would cut image tokens or the whole answer.
        need_answer: with "prompt", a sample without an answer cannot be used.
        progress: called after every sample.

    Raises:
        DataError: if there are no samples, or no row is of a format that is known.
    """
    total = len(source.rows)
    if total == 0:
        raise DataError(f"{source.name} is empty: it holds no samples.")
    read, found = sample_reader(source, kind), _Findings()
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
            if found.formats.total() == 0 and row == min(total, _ENOUGH) - 1:
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
