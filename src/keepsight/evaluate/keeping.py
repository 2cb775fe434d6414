"""Answers on disk while an evaluation runs, so that one that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.diagnose.cases import Sample
from keepsight.errors import KeepsightError
from keepsight.evaluate.answering import Answer
from keepsight.words import counted


def fingerprint(samples: Sequence[Sample]) -> dict[str, str]:
    """Of all that is asked, pixels included, and of what is right."""
    asked, right = hashlib.sha256(), hashlib.sha256()
    for sample in samples:
        asked.update(json.dumps(sample.messages, sort_keys=True, default=str).encode())
        right.update(json.dumps(sample.references).encode())
        for picture in (*sample.images, *sample.videos):
            pixels = np.asarray(picture)
            asked.update(f"{pixels.shape}".encode() + pixels.tobytes())
    return {"questions": asked.hexdigest(), "references": right.hexdigest()}


class Kept:
    """The answers so far, a line each behind a line that says what is asked of which model.

    Args:
        file: where; it is gone when the evaluation is complete.
        asked: what must be the same to go on, as JSON.

    Raises:
        KeepsightError: if the file holds answers of something else.
    """

    def __init__(self, file: Path, asked: dict[str, Any]):
        self.file = file
        self._answers: dict[str, list[Answer]] = {}
        asked = json.loads(json.dumps(asked))
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        whole = lines[:-1]  # what follows the last line's end was cut off while it was written
        if whole:
            self._read(whole, asked)
            file.write_bytes(b"".join(line + b"\n" for line in whole))
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asked, ensure_ascii=False) + "\n")

    def _read(self, lines: list[bytes], asked: dict[str, Any]) -> None:
        try:
            found, *answers = (json.loads(line) for line in lines)
            differs = [name for name in asked if found.get(name) != asked[name]]
        except (ValueError, AttributeError) as error:
            raise KeepsightError(
                f"{self.file} is no evaluation that was interrupted. Delete it, or name another --output."
            ) from error
        if differs:
            raise KeepsightError(
                f"{self.file} holds {counted(len(answers), 'answer')} of an evaluation that was interrupted, and it "
                f"asked otherwise ({', '.join(differs)}). Ask the same again to finish it, name another --output, or "
                "delete the file to begin anew."
            )
        for row in answers:
            invocations = tuple((kind, place) for kind, place in row["answer"].pop("invocations"))
            self._answers.setdefault(row["memory"], []).append(Answer(**row["answer"], invocations=invocations))

    def answers(self, memory: str) -> list[Answer]:
        """Those under one setting of the memory, in the order of the questions."""
        return list(self._answers.get(memory, ()))

    def add(self, memory: str, answers: Sequence[Answer]) -> None:
        """Keep further ones."""
        lines = [json.dumps({"memory": memory, "answer": asdict(one)}, ensure_ascii=False) + "\n" for one in answers]
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def complete(self) -> None:
        """All is answered, and saved elsewhere."""
        self.file.unlink(missing_ok=True)
