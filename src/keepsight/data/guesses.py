"""Data of no format that is known: what they look like, and which of their columns may be meant."""

from __future__ import annotations

import re
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.formats import ANSWER, IMAGES, QUESTION, SOLUTION, Row, filled, first
from keepsight.data.images import holds_pictures, is_address, is_of_pictures, is_picture_name

_LOOKS_LIKE = (
    ({"chosen", "rejected"}, "preferences (DPO)", "the better answers can be learned: --columns answer=chosen"),
    ({"bbox"}, "boxes (detection)", 'write questions and answers about them: {"image", "question", "answer"}'),
    ({"objects"}, "boxes (detection)", 'write questions and answers about them: {"image", "question", "answer"}'),
    ({"captions"}, "several captions per picture", 'write one row for each: {"image", "text"}'),
    ({"video"}, "videos", 'training reads pictures: give frames as "images"'),
    ({"videos"}, "videos", 'training reads pictures: give frames as "images"'),
)
_CALLED = {
    "question": r"question|instruction|prompt|query|ask",
    "answer": r"answer|label|output|target|truth|gold|\bgt\b|caption",
}
"""How columns are often called that hold what is missing."""
_LONGEST_NAME = 60


class UnknownFormatError(DataError):
    """A row is of no format here.

    Attributes:
        in_row: the same in short, where other rows are of a known format.
    """

    in_row = "format: none that keepsight knows"


def unknown(name: str, columns: tuple[str, ...], sample: Row, answered: bool) -> UnknownFormatError:
    """What to tell of data of no format here: what it looks like, what is missing, and what to write."""
    error = UnknownFormatError(
        f"{name}: no format that keepsight knows. It has: {', '.join(columns) or 'no columns'}. Known are chats "
        "(messages, conversations) and questions with answers, with their pictures. "
        f"{_advice(columns, sample, answered)} docs/data.md lists the formats."
    )
    here = ", ".join(column for column in columns if filled(sample.get(column))) or "nothing"
    error.in_row = f"format: none that keepsight knows; it has {here}"
    return error


def picture_columns(row: Row) -> list[str]:
    """Columns that seem to hold pictures or name them: by what stands there, then by what they are called."""
    held = [column for column in row if isinstance(column, str) and holds_pictures(row[column], or_names=True)]
    called = [column for column in row if is_of_pictures(column) and isinstance(row[column], str)]
    return list(dict.fromkeys([*held, *called]))


def _advice(columns: tuple[str, ...], sample: Row, answered: bool) -> str:
    if any(is_picture_name(one) or is_address(one) or len(one) > _LONGEST_NAME for one in columns):
        return "Its first line seems to be a sample; put one with names above it, such as image,question,answer."
    looks = next((one for one in _LOOKS_LIKE if one[0] <= set(columns)), None)
    if looks is not None:
        return f"It looks like {looks[1]}: {looks[2]}."
    row: dict[str, Any] = dict.fromkeys(columns)
    wanted = {"question": QUESTION, "answer": (*ANSWER, "output")} if answered else {"question": QUESTION}
    missing = [ours for ours, names in wanted.items() if first(row, names) is None]
    held = {column: sample.get(column) for column in columns}
    pictures = [column for column in picture_columns(held) if column not in IMAGES]
    words = [c for c, cell in held.items() if c not in (*pictures, *_NO_WORDS) and (_is_words(cell) or _answers(c))]
    picture = [] if first(row, IMAGES) is not None else [("image", pictures[0] if pictures else "COLUMN")]
    if missing == ["question", "answer"] and "label" in columns and set(words) <= {"label"}:
        return "It looks like pictures with classes: with the classes in words, take them for captions: " + _mapped(
            [("text", "label"), *picture]
        )
    if missing == ["question", "answer"] and len(words) == 1 and (pictures or not picture):
        return f"If the words describe the pictures, say so: {_mapped([('text', words[0]), *picture])}"
    guesses = [*_guesses(missing, words), *picture]
    like = f"It looks like questions and answers without {missing[0]}. " if 0 < len(missing) < len(wanted) else ""
    return f"{like}If it has them under other names, say so: {_mapped(guesses)}"


def _guesses(missing: list[str], words: list[str]) -> list[tuple[str, str]]:
    """(ours, theirs) for each that is missing: called like it, else the first that is left."""
    if SOLUTION in words and missing == ["answer"]:
        return [("answer", SOLUTION)]
    found = {ours: next((c for c in words if re.search(_CALLED[ours], c, re.IGNORECASE)), None) for ours in missing}
    left = [column for column in words if column not in found.values()]
    if len(missing) > 1:  # of two that are missing, the other may be called anything
        found = {ours: theirs or (left.pop(0) if left else None) for ours, theirs in found.items()}
    return [(ours, theirs or "COLUMN") for ours, theirs in found.items()]


def _mapped(pairs: list[tuple[str, str]]) -> str:
    return " ".join(f"--columns {ours}={_quoted(theirs)}" for ours, theirs in pairs) + "."


def _quoted(word: str) -> str:
    return f'"{word}"' if re.search(r"[\s|;&]", word) else word


def _answers(column: str) -> bool:
    """Whether it is called as answers are, which may be numbers."""
    return re.search(_CALLED["answer"], column, re.IGNORECASE) is not None


_NO_WORDS = ("id", *IMAGES, *QUESTION, *ANSWER)


def _is_words(cell: Any) -> bool:
    """Text that is no number, or several."""
    if isinstance(cell, (list, tuple)) and cell:
        return all(isinstance(one, str) for one in cell)
    return isinstance(cell, str) and not cell.replace(".", "").isdigit()
