"""What a diagnosis is made on: images with a prompt, and what the model is asked to say or has said about them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.errors import KeepsightError

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
    """

    prompt: str
    images: tuple[Any, ...] = ()
    videos: tuple[np.ndarray, ...] = ()
    answer: str | None = None
    reply: str = ""
    dataset: str = ""

    @property
    def sees(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self.images or self.videos)


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
        same = (self.sample.prompt, self.sample.reply) == (other.sample.prompt, other.sample.reply)
        if same and len(self.scored) == len(other.scored) == 1:
            return [int(other.text[other.scored[0][0]])]
        return None


def without_images(sample: Sample) -> Sample:
    """The same question about nothing."""
    return replace(sample, images=(), videos=())


def read_dataset(path: str | Path) -> list[Sample]:
    """Samples of a JSONL file: per line "prompt", "image" or "images", and, if known, "answer" and "reply".

    Image paths are relative to the file. A "dataset" in a line names the data it comes from; default: the file's name.

    Raises:
        KeepsightError: naming the line that cannot be used.
    """
    from keepsight.data.images import open_image

    path = Path(path)
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise KeepsightError(f"{path}, line {number}: not JSON ({error.msg}).") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise KeepsightError(
                f"{path}, line {number}: expected an object such as "
                '{"image": "a.png", "prompt": "What is it?", "answer": "a cat"}.'
            )
        unknown = set(entry) - {"prompt", "image", "images", "answer", "reply", "dataset", "id"}
        if unknown:
            raise KeepsightError(
                f"{path}, line {number}: unknown fields {sorted(unknown)}; known are prompt, image, images, answer, "
                "reply, dataset and id."
            )
        images = entry.get("images", entry.get("image", []))
        images = images if isinstance(images, list) else [images]
        answer = entry.get("answer")
        samples.append(
            Sample(
                prompt=entry["prompt"],
                images=tuple(open_image(image, path.parent) for image in images),
                answer=None if answer is None else str(answer),
                reply=str(entry.get("reply", "")),
                dataset=str(entry.get("dataset", path.stem)),
            )
        )
    if not samples:
        raise KeepsightError(f"{path}: no samples in it.")
    return samples


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
