"""Texts behind the images: what the base expects of them, the model with its memory on is to expect as well.

This is keepsight's own addition; it is not in the PVM paper. The loss is on answers, so where answers are short nothing
tells the branch to be still in a text, and it speaks at every token behind an image. On the laboratory's real language
model such a memory cost a text behind an image 1.2 nats a token; with texts beside the questions 0.2, and grids were
read as before (LOG.md). Data whose answers are long texts themselves teach that by themselves.

In half of the steps each batch has a piece of a text beside it: the first image of the batch, and the piece as what the
model says of it. The loss grows by the divergence a token of what is expected of the piece with the memory on from what
is expected with it off (KL), averaged over the step's batches. A piece has the sight that it has in use: no blindfold.
Which steps have pieces follows from their number, so that all processes take the same forwards; which piece follows
from the batch's samples, so that a resumed run takes the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from keepsight.data.collate import IGNORED, ConversationCollator
from keepsight.errors import KeepsightError

TOKENS = 128
"""Of a piece."""
SHORT = 24
"""Tokens of answers that are called short; our laboratory's real language model learnt from four (LOG.md)."""
_TABLES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".xml", ".html", ".gz", ".zip", ".zst", ".pdf", ".docx")
_UNREAD = 0.05
"""Share of tokens that may be unknown."""


def has_pieces(step: int) -> bool:
    """Whether optimiser step `step` (from 0) has pieces: two, then two without.

    Each pair holds a blindfolded and a sighted step, where every second one is blindfolded.
    """
    return step % 4 >= 2


def answered_tokens(messages: str, tokenizer: Any) -> list[int]:
    """Tokens of each message that is learnt, in a row of `CheckedData.dataset`."""
    learnt = [m for m in json.loads(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    said = ["".join(part.get("text", "") for part in message["content"]) for message in learnt]
    return [len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in said]


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
            KeepsightError: if it holds no text, or what this model does not read as text.
        """
        tokenizer, decoder = collator.tokenizer, collator.tokenizer.added_tokens_decoder
        special = {str(token) for token in decoder.values() if token.special}
        pieces: list[str] = []
        tokens = unread = 0
        for where, text in _texts(Path(file)):
            if found := [token for token in collator.placeholders if token in text]:
                raise KeepsightError(f"{where} holds {found[0]!r}, which stands for an image. Leave it out.")
            if found := sorted(token for token in special if token in text):
                raise KeepsightError(
                    f"{where} holds {found[0]!r}, a token with a meaning of its own to this model. Expected the texts "
                    "alone, without the marks of a chat or a tokenizer."
                )
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            tokens, unread = tokens + len(ids), unread + ids.count(tokenizer.unk_token_id)
            cut = [tokenizer.decode(ids[at : at + TOKENS]) for at in range(0, len(ids), TOKENS)]
            pieces += [whole for piece in cut if (whole := piece.strip("\ufffd \n"))]
        if not pieces:
            raise KeepsightError(
                f"{file} holds no text. Expected some thousand words of the kind the model is to write."
            )
        if unread > _UNREAD * tokens:
            raise KeepsightError(
                f"{file}: this model's tokenizer cannot read {unread / tokens:.0%} of it ({tokenizer.unk_token}). "
                "Expected texts in a language of the model."
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


_EXPECTED = 'Expected plain text in UTF-8, or .jsonl with {"text": "..."} in every line.'


def check_file(file: str | Path) -> None:
    """Refuse a file that cannot hold texts, unread.

    Raises:
        FileNotFoundError: if there is none.
        KeepsightError: if it is a folder, or a table by its ending.
    """
    file = Path(file)
    if file.is_dir() or file.suffix.lower() in _TABLES:
        raise KeepsightError(f"{file} is {'a folder' if file.is_dir() else 'no plain text'}. {_EXPECTED}")
    if not file.is_file():
        raise FileNotFoundError(f"{file} (texts whose language is to be kept) was not found.")


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of a file."""
    check_file(file)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise KeepsightError(f"{file} is no text in UTF-8. {_EXPECTED}") from error
    if file.suffix.lower() != ".jsonl":
        yield str(file), text
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON may hold other ends of lines
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            found = json.loads(line)["text"]
            found.encode()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KeepsightError(f'{where}: expected one JSON object with a "text", {{"text": "..."}}.') from error
        yield where, found


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
