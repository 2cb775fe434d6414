"""The formats people have: one recogniser and one converter each, in a table, tried from the top."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.tables.json_values import as_json

Row = Mapping[str, Any]

CHAT = ("messages", "conversations", "conversation")
QUESTION = ("question", "prompt", "query", "problem")
ANSWER = ("answer", "completion", "response", "answers", "multiple_choice_answer")
SOLUTION = "solution"
"""An answer to be rewarded; as words to learn it is asked for by name (`--columns answer=solution`)."""
CAPTION = ("text", "caption")
IMAGES = ("images", "image", "file_names", "file_name", "image_path", "image_paths")
_PLACE = re.compile(r"<image[ _]?(\d+)>")
CAPTION_PROMPT = "Describe this image."
"""What is asked of a picture that has a caption only."""


@dataclass(frozen=True)
class Turns:
    """A row's conversation, before its messages are read.

    Attributes:
        messages: of any form that `conversations.read_chat` takes.
        used: the columns they are made of.
        answer: the reference, where the row has one apart from the messages.
        answer_column: where it stands.
    """

    messages: Any
    used: tuple[str, ...]
    answer: Any = None
    answer_column: str | None = None


@dataclass(frozen=True)
class Format:
    """One way of writing a sample.

    Attributes:
        name: as the check calls it.
        fits: whether a row is of this format, by the columns that hold something.
        turns: the row's conversation.
        note: what is decided for the user, if anything.
    """

    name: str
    fits: Callable[[Row], bool]
    turns: Callable[[Row], Turns]
    note: str = ""


def first(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of the columns that holds something; else the first that is there."""
    return next((name for name in names if filled(row.get(name))), next((name for name in names if name in row), None))


def filled(value: Any) -> bool:
    """Whether a cell holds anything; a number that is none (NaN) is how pandas writes that it does not."""
    if isinstance(value, float) and math.isnan(value):
        return False
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and len(value) == 0)


def _messages(row: Row) -> list[dict[str, Any]]:
    """The messages of a chat, as far as they can be read."""
    try:
        found = as_json(row.get(first(row, CHAT) or ""), "")
    except DataError:
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, (list, tuple)) else []


def _holds(row: Row, *keys: str) -> bool:
    """Whether a message, or a part of one, has one of these keys with something in it."""
    for message in _messages(row):
        content = message.get("content")
        parts = content if isinstance(content, (list, tuple)) else []
        if any(isinstance(one, dict) and filled(one.get(key)) for one in (message, *parts) for key in keys):
            return True
    return False


def _says(row: Row, mark: str) -> bool:
    """Whether a message has a mark in its words."""
    return any(mark in str(message.get("value") or message.get("content") or "") for message in _messages(row))


def _chat(row: Row) -> Turns:
    name = first(row, CHAT)
    assert name is not None
    messages, reply = as_json(row[name], name) if row[name] else row[name], first(row, (*ANSWER, SOLUTION))
    return Turns(messages, (name,), row.get(reply or ""), reply)


def _listed(cell: Any) -> Any:
    """The messages in a cell, also as JSON; None if it is text."""
    if isinstance(cell, str) and cell.lstrip()[:2] in ("[{", "[ "):
        try:
            cell = as_json(cell, "prompt")
        except DataError:
            return None
    return cell if isinstance(cell, list) and cell and all(isinstance(one, dict) for one in cell) else None


def _trl(row: Row) -> Turns:
    """TRL's conversational form: the prompt is messages, and so may be the completion."""
    name = first(row, (*ANSWER, SOLUTION))
    reply = row.get(name or "")
    more = _listed(reply) or []
    return Turns([*_listed(row["prompt"]), *more], ("prompt", *((name,) if more and name else ())), reply, name)


def _asked(row: Row, question: str, answers: tuple[str, ...]) -> Turns:
    name, used, asked, messages = first(row, answers), [question], row.get(question), []
    if not isinstance(asked, str) or not asked.strip():
        raise DataError(f"{question}: {'empty' if not filled(asked) else f'expected text, found {asked!r:.60}'}")
    if question == "instruction" and filled(row.get("input")):
        asked, used = f"{asked}\n{row['input']}", [*used, "input"]
    if filled(row.get("history")):
        used.append("history")
        for pair in as_json(row["history"], "history"):
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise DataError(f"history: expected [question, answer], found {pair!r:.60}")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Turns([*messages, {"role": "user", "content": asked}], tuple(used), row.get(name or ""), name)


def _question(row: Row) -> Turns:
    return _asked(row, first(row, QUESTION) or "question", (*ANSWER, SOLUTION))


def _cauldron(row: Row) -> Turns:
    messages = []
    for turn in as_json(row["texts"], "texts"):
        if not isinstance(turn, dict) or "user" not in turn or "assistant" not in turn:
            raise DataError(f'texts: expected {{"user": ..., "assistant": ...}}, found {turn!r:.60}')
        messages += [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
    images = [{"type": "image"}] * len(images_of(row))
    if messages and images and "<image>" not in messages[0]["content"]:
        messages[0]["content"] = [*images, {"type": "text", "text": messages[0]["content"]}]
    return Turns(messages, ("texts",))


def _caption(row: Row) -> Turns:
    name = first(row, CAPTION)
    assert name is not None
    return Turns([{"role": "user", "content": CAPTION_PROMPT}], (), row[name], name)


def _has(row: Row, *groups: tuple[str, ...]) -> bool:
    return all(first(row, group) is not None for group in groups)


FORMATS = (
    Format("Qwen-VL's first form (<img>FILE</img> in the words)", lambda row: _says(row, "</img>"), _chat),
    Format("OpenAI chat (image_url inside messages)", lambda row: _holds(row, "image_url"), _chat),
    Format(
        "Qwen chat (images inside messages)",
        lambda row: _holds(row, "image", "url", "path", "base64", "source"),
        _chat,
    ),
    Format(
        "LLaVA (conversations of from and value, image)",
        lambda row: _holds(row, "from") and "images" not in row,
        _chat,
    ),
    Format("ShareGPT (conversations of from and value, images)", lambda row: _holds(row, "from"), _chat),
    Format("chat (messages and images)", lambda row: _has(row, CHAT), _chat),
    Format("chat (prompt and completion, as TRL has it)", lambda row: _listed(row.get("prompt")) is not None, _trl),
    Format(
        "Alpaca (instruction, input, output)",
        lambda row: _has(row, ("instruction",), ("output", *ANSWER)),
        lambda row: _asked(row, "instruction", ("output", *ANSWER)),
    ),
    Format(
        "VQA (question and answer)",
        lambda row: first(row, QUESTION) == "question" and _has(row, (*ANSWER, SOLUTION)),
        _question,
    ),
    Format("prompt and answer", lambda row: _has(row, QUESTION, (*ANSWER, SOLUTION)), _question),
    Format("The Cauldron (texts of user and assistant)", lambda row: "texts" in row, _cauldron),
    Format(
        "captions (a picture and its text)",
        lambda row: _has(row, CAPTION, IMAGES) and not _has(row, QUESTION) and not _has(row, ("label",)),
        _caption,
        f'asked of every picture: "{CAPTION_PROMPT}"; for questions of your own, add a column "question"',
    ),
    Format("questions without answers", lambda row: _has(row, QUESTION), _question),
)


def recognise(row: Row, answered: bool) -> tuple[Format, Turns] | None:
    """A row's format and its conversation, judged by the columns that hold something, then by those that are there.

    Args:
        row: its columns, under our names.
        answered: whether answers are to be learned, so that questions alone are no format.

    Raises:
        DataError: if a cell of the format cannot be read.
    """
    if answered:
        row = {name: value for name, value in row.items() if name != SOLUTION}
    for seen in ({name: value for name, value in row.items() if filled(value)}, row):
        for one in FORMATS:
            if one.fits(seen) and not (answered and one is FORMATS[-1]):
                return one, one.turns(row)
    return None


def images_of(row: Row) -> list[Any]:
    """Of the row's image column: none, one, or several."""
    name = first(row, IMAGES)
    if name is not None and filled(row[name]):
        return as_list(row[name])
    return [one for name in numbered(row) for one in as_list(row[name])]


def numbered(row: Row) -> list[str]:
    """Columns of one picture each: image_1, image_2, ... (MMMU has them)."""
    found = {name: re.fullmatch(r"image_?(\d+)", name) for name in row}
    return sorted((name for name, match in found.items() if match), key=lambda name: int(found[name][1]))  # type: ignore[index]


def as_list(cell: Any) -> list[Any]:
    """A cell's images: none, one, or several (as a list, or a list in text)."""
    if not filled(cell):
        return []
    if isinstance(cell, str) and cell[0] in "[{":
        try:
            cell = as_json(cell, "images")
        except DataError:
            return [cell]  # a file's name
    if isinstance(cell, (list, tuple)) and isinstance(cell[0], (list, tuple)):
        raise DataError(
            "images: lists within a list, as arrays of pixels are stored; which are pictures is not to be seen",
            "Store pictures: files, bytes, or PIL.Image.fromarray(array), one of each (datasets.Image() keeps them).",
        )
    if isinstance(cell, dict) and all(_PLACE.fullmatch(str(key)) for key in cell):  # MiniCPM-V: {"<image_00>": FILE}
        return [cell[key] for key in sorted(cell, key=lambda key: int(_PLACE.fullmatch(key)[1])) if filled(cell[key])]  # type: ignore[index]
    return [_plain(one) for one in cell] if isinstance(cell, (list, tuple)) else [_plain(cell)]


def _plain(one: Any) -> Any:
    """An image without OpenAI's frame around its address."""
    return one["url"] if isinstance(one, dict) and isinstance(one.get("url"), str) else one
