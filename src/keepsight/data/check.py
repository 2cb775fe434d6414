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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keepsight.data.conversations import DataError, normalise_messages
from keepsight.data.reading import Source, load_dataset_any
from keepsight.data.samples import Kind, as_dataset, as_row, check_images, read_sample, sample_reader, undecoded
from keepsight.errors import KeepsightError

__all__ = [
    "CheckedData",
    "DataError",
    "Kind",
    "Policy",
    "Source",
    "Survey",
    "check_dataset",
    "load_dataset_any",
    "normalise_messages",
    "read_sample",
    "survey_dataset",
]

Policy = Literal["error", "skip", "keep"]
OverLong = Literal["error", "skip", "truncate"]
Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""
Measure = Callable[[dict[str, Any]], tuple[int, int]]
"""Sample -> (tokens after processing, tokens up to the last image or the start of the first answer)."""

_SHOWN = 5


@dataclass(frozen=True)
class CheckedData:
    """Data that passed every check.

    Attributes:
        dataset: a `datasets.Dataset` with the columns `messages`, `images` and `columns`, for `read_sample`.
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

    @property
    def digest(self) -> str:
        """Of the words, the other columns and the images' names, in order, so that a resumed run knows its data.

        Not of folders, so that data may move; and of images stored in the data only the place, as reading them is slow.
        """
        found = hashlib.blake2b(digest_size=8)
        for row in self.dataset:
            images = [
                Path(cell["path"]).name if cell["path"] else [cell["row"], cell["index"]] for cell in row["images"]
            ]
            found.update(json.dumps([row["messages"], row["columns"], images]).encode())
        return found.hexdigest()


@dataclass(frozen=True)
class Survey:
    """All that was found in a dataset, good and bad.

    Attributes:
        source: what was read.
        rows: good samples, as the trainer's dataset keeps them.
        problems: (where, what is wrong) of every sample that cannot be used.
        hints: what to do about them, each once.
        skipped: (where, why) of every sample that was left out on purpose.
        image_counts: images per good sample.
        text_only: good samples without an image.
        lengths: tokens of good samples after processing, before cutting, where they were measured.
        cut: samples whose answers training will cut.
        duplicates: samples that equal an earlier one, word for word and image for image.
    """

    source: Source
    rows: list[dict[str, Any]]
    problems: tuple[tuple[str, str], ...]
    hints: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    image_counts: tuple[int, ...]
    text_only: int
    lengths: tuple[int, ...]
    cut: int
    duplicates: int


def survey_dataset(
    source: Source,
    *,
    kind: Kind = "chat",
    text_only: Policy = "error",
    decode: bool = True,
    measure: Measure | None = None,
    max_length: int | None = None,
    over_long: OverLong = "error",
    need_answer: bool = False,
    progress: Progress | None = None,
) -> Survey:
    """Look at every sample and collect what is wrong. Arguments as `check_dataset`.

    Raises:
        DataError: if there are no samples, or the columns have no reading.
    """
    if len(source.rows) == 0:
        raise DataError(f"{source.name} is empty: it holds no samples.")
    to_sample = sample_reader(source, kind)
    rows: list[dict[str, Any]] = []
    problems: list[tuple[str, str]] = []
    hints: dict[str, None] = {}  # an ordered set
    skipped: list[tuple[str, str]] = []
    images: list[int] = []
    lengths: list[int] = []
    seen: Counter[bytes] = Counter()
    cut = 0
    for row, raw in enumerate(undecoded(source.rows, kind)):
        where = source.where(row)
        try:
            sample = to_sample(raw)
            check_images(sample, source.folder, decode)
            if need_answer and sample.get("answer") in (None, "", []):
                raise DataError("answer: empty; the reward compares with it")
            skip = _without_image(text_only) if not sample["images"] else None
            if skip is None and measure is not None:
                length, needed = measure(sample)
                if max_length is not None and length > max_length:
                    skip = _over_long(length, needed, max_length, over_long)
                    cut += skip is None
                if skip is None:
                    lengths.append(length)
            if skip is None:
                rows.append(as_row(sample, row))
                images.append(len(sample["images"]))
                seen[_fingerprint(sample)] += 1
            else:
                skipped.append((where, skip))
        except KeepsightError as error:
            problems.append((where, str(error).rstrip(".")))
            hints[getattr(error, "hint", "")] = None
        if progress is not None:
            progress(row + 1, len(source.rows))
    return Survey(
        source=source,
        rows=rows,
        problems=tuple(problems),
        hints=tuple(hint for hint in hints if hint),
        skipped=tuple(skipped),
        image_counts=tuple(images),
        text_only=sum(count == 0 for count in images),
        lengths=tuple(lengths),
        cut=cut,
        duplicates=sum(seen.values()) - len(seen),
    )


def check_dataset(
    source: Source,
    *,
    kind: Kind = "chat",
    text_only: Policy = "error",
    decode: bool = True,
    measure: Measure | None = None,
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
        measure: sample -> (tokens after processing, tokens up to the last image or the start of the first answer,
            whichever is later); needed for `max_length`. Its own errors are reported like the others.
        max_length: the longest sample, in tokens, that training will see.
        over_long: what to do with a longer one. "truncate" cuts the end of the answer, and is an error where that
            would cut image tokens or the whole answer.
        need_answer: with "prompt", a sample without an answer cannot be used.
        progress: called after every sample.

    Raises:
        DataError: one message for all problems found, naming row and column.
    """
    found = survey_dataset(
        source,
        kind=kind,
        text_only=text_only,
        decode=decode,
        measure=measure,
        max_length=max_length,
        over_long=over_long,
        need_answer=need_answer,
        progress=progress,
    )
    _report(source, [f"{where}, {what}" for where, what in found.problems], " ".join(found.hints))
    if found.text_only == len(found.rows) > 0:
        raise DataError(f"{source.name}: no sample has an image, so there is nothing that a visual memory could learn.")
    if not found.rows:
        why = found.skipped[0][1]
        raise DataError(f"{source.name}: no sample is left; all {len(found.skipped)} were skipped ({why}).")
    return CheckedData(
        as_dataset(found.rows),
        source,
        len(found.rows),
        found.skipped,
        found.text_only,
        max(found.lengths, default=0) if max_length is not None else None,
        found.cut,
    )


def _without_image(policy: Policy) -> str | None:
    """Why to skip a sample without an image; None to keep it."""
    if policy == "error":
        raise DataError(
            "images: no image; a sample without one teaches the memory nothing",
            "To leave samples without an image out: --text-only skip. To train on them all the same: --text-only keep.",
        )
    return "no image" if policy == "skip" else None


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


def _report(source: Source, problems: list[str], hint: str) -> None:
    if not problems:
        return
    if len(problems) == 1:
        raise DataError(f"{source.name}, {problems[0]}. {hint}".rstrip())
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    lines = "\n  ".join([f"{source.name} has {len(problems)} samples that cannot be used:", *problems[:_SHOWN], *more])
    raise DataError(f"{lines}\n{hint}".rstrip())


def _fingerprint(sample: dict[str, Any]) -> bytes:
    """Of the words and the images: files by their path, stored images by their bytes."""
    digest = hashlib.blake2b(json.dumps(sample["messages"], sort_keys=True).encode(), digest_size=16)
    for item in sample["images"]:
        content: Any = item.get("bytes") if isinstance(item, dict) else item
        if hasattr(content, "tobytes"):
            content = content.tobytes()
        digest.update(content if isinstance(content, bytes) else str(content).encode())
    return digest.digest()
