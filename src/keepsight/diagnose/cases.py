"""What a diagnosis is made on: images with a prompt, and what the model is asked to say or has said about them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.errors import KeepsightWarning

#: Asks for a look at the image at every step of a long answer (the paper's "blind painter").
LONG_PROMPT = (
    "A painter who cannot see this picture will paint an exact copy of it from your words alone. Guide the brush "
    "stroke by stroke, from the top left to the bottom right: for every stroke say where it goes, its shape, its "
    "colour and what it belongs to. Look again at the picture before each stroke, never summarise, never repeat "
    "yourself, and do not stop before every corner has been painted."
)


@dataclass(frozen=True)
class Sample:
    """One question about images.

    Attributes:
        prompt: what is asked.
        images: PIL images, in order.
        videos: videos, each uint8 [F, H, W, 3].
        answer: the reference, if there is one.
        reply: how the reply begins; the answer follows it. It makes an answer stand at any length of output.
        dataset: the name of the data it comes from; invocations are told apart by it.
        before: the words that stand before each image, where not all images come first.
    """

    prompt: str
    images: tuple[Any, ...] = ()
    videos: tuple[np.ndarray, ...] = ()
    answer: str | None = None
    reply: str = ""
    dataset: str = ""
    before: tuple[str, ...] = ()

    @property
    def sees(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.images or self.videos)

    @property
    def content(self) -> list[dict[str, str]]:
        """The user's message in parts, as chat templates take it."""
        parts = []
        for index in range(max(len(self.images), len(self.before))):
            if index < len(self.before) and self.before[index]:
                parts.append({"type": "text", "text": self.before[index]})
            if index < len(self.images):
                parts.append({"type": "image"})
        return [*parts, *({"type": "video"} for _ in self.videos), {"type": "text", "text": self.prompt}]


@dataclass
class Case:
    """A sample as tensors, with a text that follows the prompt.

    Attributes:
        sample: where it comes from.
        text: [n] token ids after the prompt.
        scored: index into `text` of the first token of each reference answer, and one past its last.
        facts: of a task whose facts are known: the token id of the answer to each question that its image allows [Q].
        asked: which of these questions each scored answer is about.
    """

    sample: Sample
    text: torch.Tensor
    scored: list[tuple[int, int]] = field(default_factory=list)
    facts: torch.Tensor | None = None
    asked: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """The text has no references in it and is scored as a whole."""
        return self.sample.answer is None and self.scored == [(0, len(self.text))]

    def answers_for(self, other: Case) -> list[int] | None:
        """First token of each answer if the image were `other`'s; None if that is not known."""
        if self.asked is not None and other.facts is not None:
            return other.facts[self.asked].tolist()
        mine, theirs = self.sample, other.sample
        same = (mine.before, mine.prompt, mine.reply) == (theirs.before, theirs.prompt, theirs.reply)
        if same and len(self.scored) == len(other.scored) == 1:
            return [int(other.text[other.scored[0][0]])]
        return None


def without_images(sample: Sample) -> Sample:
    """The same question about nothing."""
    return replace(sample, images=(), videos=())


def read_dataset(source: Any, split: str = "train") -> list[Sample]:
    """Samples of whatever `keepsight.data.check.load_dataset_any` reads: one question each, with pictures.

    An "answer" (or the assistant's message) is the reference, "reply" how the reply begins, and "dataset" names the
    data that a sample comes from; default: the file's name.

    Raises:
        KeepsightError: naming file and line of what cannot be used.
    """
    from keepsight.data.check import check_dataset, load_dataset_any, read_sample
    from keepsight.data.formats import said

    data = load_dataset_any(source, split)
    # pictures are opened below, one by one
    checked = check_dataset(data, kind="prompt", text_only="keep", decode=False, rehearse=_one_question).good()
    own = Path(data.name).stem
    samples, unused = [], dict[str, None]()
    for kept in checked.kept:
        sample = read_sample(kept, data)
        unused |= dict.fromkeys(name for name in sample if name not in _USED)
        before, words = _laid_out(sample["messages"][-1]["content"])
        answer = sample["answer"]
        samples.append(
            Sample(
                prompt=words,
                images=tuple(sample["images"]),
                answer=None if answer is None else said(answer)[0],
                reply=str(sample.get("reply") or ""),
                dataset=str(sample.get("dataset") or own),
                before=before,
            )
        )
    _, ignored = checked.told.get("ignored", (0, {}))
    if unused or ignored:
        names = ", ".join((*unused, *ignored))
        warnings.warn(f"{data.name}: not used by the diagnosis: {names}.", KeepsightWarning, stacklevel=2)
    return samples


_USED = ("messages", "images", "answer", "reply", "dataset", "id")


@dataclass(frozen=True)
class _Nothing:
    """What `check_dataset` asks of a rehearsal, with nothing to tell."""

    length: None = None
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def _one_question(sample: dict[str, Any], images: list[Any] | None) -> _Nothing:
    from keepsight.data.conversations import DataError
    from keepsight.data.rehearsal import Rehearsal

    roles = [message["role"] for message in sample["messages"]]
    if roles != ["user"]:
        raise DataError(
            f"messages: {', '.join(roles)}; the diagnosis asks one question and reads one answer",
            "Give it conversations of one question; a system message can be left out: --ignore system.",
        )
    if not _laid_out(sample["messages"][0]["content"])[1].strip():
        raise DataError("messages[0]: no words behind the pictures; the diagnosis asks a question about them")
    Rehearsal(None, answered=False)(sample, images)
    return _Nothing()


def _laid_out(content: list[dict[str, Any]]) -> tuple[tuple[str, ...], str]:
    """(the words before each image, empty where none has any; the words behind the last)."""
    pieces = [""]
    for part in content:
        if part["type"] == "image":
            pieces.append("")
        else:
            pieces[-1] += part["text"]
    *before, words = pieces
    return (tuple(before) if any(before) else ()), words


def stand_in_images(like: Sequence[Any], count: int = 4, seed: int = 0) -> list[list[Any]]:
    """Other images of the same sizes, for when there is no second sample: random smooth colour fields."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(count):
        images = []
        for image in like:
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            images.append(coarse.resize((image.width, image.height), Image.Resampling.BICUBIC))
        sets.append(images)
    return sets
