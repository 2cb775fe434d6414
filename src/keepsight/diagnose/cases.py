"""Samples of a diagnosis: images, prompts, reference answers, and texts that follow them."""

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
        answer: the reference, if there is one; of several, the one that is given to read.
        also_right: the others; a freely written answer is right when it meets any of them.
        reply: how the reply begins; the answer follows it. It makes an answer stand at any length of output.
        dataset: the name of the data it comes from; invocations are told apart by it.
        before: the words that stand before each image, where not all images come first.
        earlier: messages before the question, their contents as parts; their images are the first of `images`.
    """

    prompt: str
    images: tuple[Any, ...] = ()
    videos: tuple[np.ndarray, ...] = ()
    answer: str | None = None
    reply: str = ""
    dataset: str = ""
    before: tuple[str, ...] = ()
    earlier: tuple[dict[str, Any], ...] = ()
    also_right: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All that is right."""
        return () if self.answer is None else (self.answer, *self.also_right)

    @property
    def sees(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.images or self.videos)

    @property
    def content(self) -> list[dict[str, str]]:
        """The user's message in parts, as chat templates take it."""
        parts, shown = [], max(0, len(self.images) - sum(map(_images_in, self.earlier)))
        for index in range(max(shown, len(self.before))):
            if index < len(self.before) and self.before[index]:
                parts.append({"type": "text", "text": self.before[index]})
            if index < shown:
                parts.append({"type": "image"})
        words = [{"type": "text", "text": self.prompt}] if self.prompt or not any(self.before) else []
        return [*parts, *({"type": "video"} for _ in self.videos), *words]

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation up to the answer, as chat templates take it."""
        left = iter(self.images)  # another sample's images may be fewer
        earlier = [
            {
                **message,
                "content": [p for p in message["content"] if p["type"] != "image" or next(left, None) is not None],
            }
            for message in self.earlier
        ]
        return [*earlier, {"role": "user", "content": self.content}]


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
        same = all(getattr(mine, name) == getattr(theirs, name) for name in ("earlier", "before", "prompt", "reply"))
        if same and len(self.scored) == len(other.scored) == 1:
            return [int(other.text[other.scored[0][0]])]
        return None


def without_images(sample: Sample) -> Sample:
    """The same question about nothing."""
    return replace(sample, images=(), videos=())


def read_dataset(source: Any, split: str = "train", processor: Any = None) -> list[Sample]:
    """Questions about pictures, of whatever `keepsight.data.check.load_dataset_any` reads, as training reads them.

    An "answer" (or the last message of the assistant) is the reference, or a list any of which is right, "reply" how
    the reply begins, and "dataset" names the data that a sample comes from; default: the file's name.

    Args:
        source: the data, a `Reading` of them, or the `Source` that was read.
        split: which split, where there are several.
        processor: of the model that will be asked; with it, what it cannot read is an error here.

    Raises:
        KeepsightError: naming file and line of what cannot be used.
    """
    from keepsight.data.answers import references
    from keepsight.data.check import Source, check_dataset, load_dataset_any, read_sample
    from keepsight.data.collate import ConversationCollator
    from keepsight.data.rehearsal import Rehearsal

    data = source if isinstance(source, Source) else load_dataset_any(source, split)
    collator = None if processor is None else ConversationCollator(processor)
    rehearsal = Rehearsal(collator, answered=False, ignore=data.reading.ignore)
    checked = check_dataset(data, kind="prompt", text_only="keep", rehearse=_asked(rehearsal)).good()
    own = Path(data.name).stem
    samples, unused, decided = [], dict[str, None](), dict[str, None]()
    for kept in checked.kept:
        sample = read_sample(kept, data)
        unused |= dict.fromkeys(name for name in sample if name not in _USED)
        *earlier, question = sample["messages"]
        before, words = _laid_out(question["content"])
        answer, *others = references(sample["answer"]) or (None,)
        decided |= {_SEVERAL: None} if others else {}
        samples.append(
            Sample(
                prompt=words,
                images=tuple(sample["images"]),
                answer=answer,
                reply=str(sample.get("reply") or ""),
                dataset=str(sample.get("dataset") or own),
                before=before,
                earlier=tuple(earlier),
                also_right=tuple(others),
            )
        )
    told = {subject: list(words) for subject, (_, words) in checked.told.items()}
    told["not used"] = [*unused, *told.pop("ignored", [])]
    told["decided"] = [*told.pop("decided", []), *decided]
    for subject, found in told.items():
        if found:
            warnings.warn(f"{data.name}: {subject}: {', '.join(found)}.", KeepsightWarning, stacklevel=2)
    return samples


_SEVERAL = "of several answers any is right; where one is given to read, it is the most frequent"
_USED = ("messages", "images", "answer", "reply", "dataset", "id")


def _asked(rehearse: Any) -> Any:
    """A rehearsal that also wants a question, and an answer that can be compared with if there is one."""

    def check(sample: dict[str, Any], images: list[Any] | None) -> Any:
        from keepsight.data.answers import references
        from keepsight.data.errors import DataError

        references(sample["answer"])

        before, words = _laid_out(sample["messages"][-1]["content"])
        if not any(text.strip() for text in (*before, words)):
            raise DataError(f"messages[{len(sample['messages']) - 1}]: no words, so nothing is asked")
        return rehearse(sample, images)

    return check


def _images_in(message: dict[str, Any]) -> int:
    return sum(part["type"] == "image" for part in message["content"])


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
