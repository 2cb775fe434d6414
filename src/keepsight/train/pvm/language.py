"""Texts behind the images: what the base expects of them, the model with its memory on is to expect as well.

This is keepsight's own addition; it is not in the PVM paper. The loss is on answers, so where answers are short nothing
tells the branch to be still in a text, and it speaks at every token behind an image. On the laboratory's real language
model such a memory cost a text behind an image 1.2 nats a token; with texts beside the questions 0.2, and grids were
read as before (LOG.md). Data whose answers are long texts themselves teach that by themselves.

In every second step each batch has a piece of a text beside it: the first image of the batch, and the piece as what the
model says of it. The loss grows by the divergence a token of what is expected of the piece with the memory on from what
is expected with it off (KL), averaged over the step's batches. A piece has the sight that it has in use: no blindfold.
Which steps have pieces follows from their number, so that all processes take the same forwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from keepsight.data.collate import IGNORED, ConversationCollator
from keepsight.errors import KeepsightError

TOKENS = 128
"""Of a piece."""
EVERY = 2
"""Steps from one with pieces to the next: a piece needs two forwards of its own."""

SHORT = 16
"""Words of answers that are called short; our laboratory's real language model learnt from three (LOG.md)."""


def answered_words(messages: str) -> int:
    """How many words the assistant says in a row of `CheckedData.dataset`."""
    said = [message["content"] for message in json.loads(messages) if message["role"] == "assistant"]
    return sum(len(part.get("text", "").split()) for parts in said for part in parts)


@dataclass(frozen=True)
class Pieces:
    """Texts, cut into pieces of `TOKENS` tokens. Goes to workers.

    Attributes:
        texts: the pieces.
        seed: of which piece stands beside which batch.
    """

    texts: tuple[str, ...]
    seed: int

    @classmethod
    def read(cls, file: str | Path, collator: ConversationCollator, seed: int) -> Pieces:
        """Cut the texts of a file.

        Args:
            file: plain text in UTF-8, or with the ending .jsonl one object with "text" a line.
            collator: of the model's processor.
            seed: see `Pieces`.

        Raises:
            FileNotFoundError: if there is no such file.
            KeepsightError: if it holds no text, or a placeholder of an image.
        """
        texts = _texts(Path(file))
        for text in texts:
            if found := [token for token in collator.placeholders if token in text]:
                raise KeepsightError(
                    f"{file} holds {found[0]!r}, which stands for an image. Expected texts alone; leave it out."
                )
        pieces: list[str] = []
        for text in texts:
            ids = collator.tokenizer(text, add_special_tokens=False)["input_ids"]
            cut = [collator.tokenizer.decode(ids[at : at + TOKENS]) for at in range(0, len(ids), TOKENS)]
            pieces += [whole for piece in cut if (whole := piece.strip("\ufffd \n"))]
        if not pieces:
            raise KeepsightError(
                f"{file} holds no text. Expected some thousand words of the kind the model is to write."
            )
        return cls(tuple(pieces), seed)

    @property
    def digest(self) -> str:
        """Of the pieces, for a run that goes on."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16]

    def beside(self, samples: list[dict[str, Any]], places: list[int]) -> dict[str, Any]:
        """What is read beside a batch: {"messages", "images"}; a text alone where no sample has an image.

        Args:
            samples: of the batch, as `ConversationCollator` takes them.
            places: theirs in the data; the piece follows from them, so that a resumed run draws the same.
        """
        draw = int.from_bytes(hashlib.sha256(f"{self.seed} {places}".encode()).digest()[:8], "big")
        images: list[Any] = next((sample["images"][:1] for sample in samples if sample["images"]), [])
        asked = [{"type": "image"}] if images else [{"type": "text", "text": ""}]
        said = [{"type": "text", "text": self.texts[draw % len(self.texts)]}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        return {"messages": turns, "images": images}


def _texts(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} (texts whose language is to be kept) was not found.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KeepsightError(
            f'{file} is no text in UTF-8. Expected plain text, or .jsonl with {{"text": "..."}} in every line.'
        ) from error
    if file.suffix.lower() != ".jsonl":
        return [text]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise KeepsightError(f'{file}, line {number}: expected one JSON object with a "text", {{"text": "..."}}.')
        found.append(row["text"])
    return found


def divergence(model: Any, off: Callable[[], Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """KL divergence a token of what is expected of a piece with the memory on from what is expected with it off.

    Args:
        model: as it is trained; called twice.
        off: makes the context in which its adapter is off.
        batch: of `ConversationCollator`, one row; its labels are the piece.

    Returns:
        A scalar in nats, in float32; 0 to the bit while all gates are 0.
    """
    labels = batch["labels"][0]
    first = int((labels != IGNORED).nonzero()[0])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    counted = labels[first:] != IGNORED

    def expected() -> torch.Tensor:
        kept = len(labels) - first + 1
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
        return logits[0, -kept:-1][counted].float().log_softmax(-1)

    with torch.no_grad(), off():
        before = expected()
    return F.kl_div(expected(), before, reduction="batchmean", log_target=True)
