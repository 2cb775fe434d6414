"""From rows of any format to samples of one form.

A sample of supervised training is {"messages", "images"} and, where the row has them, "tools"; its last message is the
assistant's. A sample of reinforcement learning has the messages up to the question only, and every other column beside
them, "answer" among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from keepsight.data.answers import said, text_of
from keepsight.data.conversations import read_chat
from keepsight.data.errors import DataError
from keepsight.data.formats import (
    ANSWER,
    CAPTION,
    CHAT,
    IMAGES,
    QUESTION,
    SOLUTION,
    Format,
    Turns,
    as_list,
    filled,
    first,
    images_of,
    numbered,
    recognise,
)
from keepsight.data.guesses import unknown
from keepsight.data.lost import refuse_loss, refuse_preferences
from keepsight.data.tables.json_values import as_json
from keepsight.data.tables.reading import Source

Kind = Literal["chat", "prompt"]
"""What a sample is for: "chat" to learn its answers by heart, "prompt" to be answered and rewarded."""

_ROLES = {  # what `--columns` maps -> the columns that it takes the place of
    "messages": CHAT,
    "question": QUESTION,
    "prompt": QUESTION,
    "answer": (*ANSWER, SOLUTION),
    "text": CAPTION,
    "images": IMAGES,
    "image": IMAGES,
    "system": ("system",),
    "tools": ("tools",),
    "reply": ("reply",),
    "dataset": ("dataset",),
}


@dataclass(frozen=True)
class Read:
    """A row as a sample.

    Attributes:
        sample: see above; images as found.
        format: the name of the row's format.
        notes: what was decided, each in a few words.
        ignored: columns and keys that hold something and are not used.
    """

    sample: dict[str, Any]
    format: str
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())


def sample_reader(source: Source, kind: Kind = "chat") -> Callable[[dict[str, Any]], Read]:
    """How to turn a raw row into a sample.

    Args:
        source: what `load_dataset_any` returned.
        kind: what samples are for.

    Raises:
        DataError: if `--columns` names what is not there; the returned function raises it for single rows.
    """
    _check_names(source)
    answered = kind == "chat"

    def read(raw: dict[str, Any]) -> Read:
        row, left = _under_our_names(raw, source)
        found = recognise(row, answered)
        if found is None:
            raise unknown(source.name, source.columns, raw, answered)
        form, turns = found
        try:
            return sample(row, left, form, turns)
        except DataError as error:
            error.format = form.name
            raise

    def sample(row: dict[str, Any], left: set[str], form: Format, turns: Turns) -> Read:
        pictures, used = _pictures(row)
        used |= set(turns.used)
        messages, right, notes = _with_answer(turns, used, answered)
        messages, tools = _with_system(messages, row, used), None
        if answered and last_role(messages) not in REPLIES:
            refuse_preferences(row)
        chat = read_chat(messages, pictures, answered, source.reading.ignore)
        if filled(row.get("tools")) and answered:
            tools = _described(as_json(row["tools"], "tools"))
            used.add("tools")
        rest = {name: value for name, value in row.items() if name not in used and filled(value)}
        refuse_loss(rest, chat, answered)
        kept = {name: value for name, value in rest.items() if not answered and _is_plain(value)}
        left |= {name for name in rest if name not in kept} | chat.ignored
        made: dict[str, Any] = {**kept, "messages": chat.messages, "images": chat.images}
        made |= {"tools": tools} if tools else {}
        made |= {} if answered else {"answer": right}
        notes = (*notes, *((form.note,) if form.note else ()))
        return Read(made, form.name, notes, tuple(sorted(left)))

    return read


def _check_names(source: Source) -> None:
    for ours, theirs in source.reading.columns.items():
        if ours not in _ROLES:
            raise DataError(f"--columns {ours}={theirs}: {ours} is no column of ours. Known are {', '.join(_ROLES)}.")
        for name in theirs.split("+"):
            if name not in source.columns:
                raise DataError(
                    f"--columns {ours}={theirs}: {source.name} has no column {name!r}. It has: "
                    f"{', '.join(source.columns) or 'none'}."
                )


def _under_our_names(raw: dict[str, Any], source: Source) -> tuple[dict[str, Any], set[str]]:
    """(the row with what `--columns` says, without what `--ignore` says; names that are ignored and hold something)."""
    reading = source.reading
    mapped, taken, replaced = {}, set[str](), set[str]()
    for ours, theirs in reading.columns.items():
        names = theirs.split("+")
        cells = [raw.get(name) for name in names]
        mapped[ours] = cells[0] if len(cells) == 1 else [one for cell in cells for one in as_list(cell)]
        taken |= set(names)
        replaced |= set(_ROLES[ours])
    rest = {name: value for name, value in raw.items() if name not in taken}
    out = {name for name in rest if name in replaced or name in reading.ignore}
    return {**{k: v for k, v in rest.items() if k not in out}, **mapped}, {name for name in out if filled(rest[name])}


def _pictures(row: dict[str, Any]) -> tuple[list[Any], set[str]]:
    """(the row's images beside its messages, the columns they stand in)."""
    name = first(row, IMAGES)
    if name is None or not filled(row[name]):
        return images_of(row), {*numbered(row), *((name,) if name else ())}
    others = [other for other in IMAGES if other != name and filled(row.get(other))]
    found = as_list(row[name])
    for other in others:
        if as_list(row[other]) != found:
            raise DataError(
                f"images: two columns hold some, {name} and {other}; which are meant?",
                f"Say so: --columns image={name}, --columns images={name}+{other} for all of them, or --ignore "
                f"{other}.",
            )
    return found, {name, *others}


def _with_answer(turns: Turns, used: set[str], answered: bool) -> tuple[Any, Any, tuple[str, ...]]:
    """(messages, the reference answer, notes): with the answer at their end, or up to the question."""
    messages, right = turns.messages, turns.answer
    notes: tuple[str, ...] = ()
    last = last_role(messages)
    asked, replies = last is not None, last in REPLIES
    if answered:
        if asked and not replies and turns.answer_column is not None:
            used.add(turns.answer_column)
            text, note = said(right)
            if not text.strip():
                raise DataError(f"{turns.answer_column}: empty")
            messages, notes = [*messages, {"role": "assistant", "content": text}], (note,) if note else ()
        return messages, None, notes
    right = right if filled(right) else None
    if turns.answer_column is not None:
        used.add(turns.answer_column)
    if replies:
        words, messages = messages[-1].get("content", messages[-1].get("value")), messages[:-1]
        right = text_of(words) if right is None or _is_chat(right) else right
    return messages, right, notes


REPLIES = ("assistant", "gpt", "chatgpt", "model", "bot")


def last_role(messages: Any) -> str | None:
    """Whose the last message is, as the data call it; empty where it does not say, None where there are none."""
    there = isinstance(messages, (list, tuple)) and messages and isinstance(messages[-1], dict)
    return str(messages[-1].get("role") or messages[-1].get("from") or "") if there else None


def _with_system(messages: Any, row: dict[str, Any], used: set[str]) -> Any:
    system = row.get("system")
    if not filled(system) or not isinstance(messages, (list, tuple)):
        return messages
    if not isinstance(system, str):
        raise DataError(f"system: expected text, found {system!r:.60}")
    begins = messages[0] if messages and isinstance(messages[0], dict) else {}
    if "system" in (begins.get("role"), begins.get("from")):
        raise DataError("system: a column and a message; which is meant?", "To leave the column out: --ignore system.")
    used.add("system")
    return [{"role": "system", "content": system}, *messages]


def _described(tools: Any) -> Any:
    """Tools as chat templates take them; ShareGPT's data name the functions only."""
    if not isinstance(tools, (list, tuple)):
        return tools
    return [{"type": "function", "function": one} if isinstance(one, dict) and "name" in one else one for one in tools]


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "content" in one for one in value)


def _is_plain(value: Any) -> bool:
    """Whether a column's value goes through JSON: images and bytes do not."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def images_in(raw: dict[str, Any], source: Source) -> list[Any]:
    """The images of a raw row that is known to be good, in the order of their parts."""
    row, _ = _under_our_names(raw, source)
    found = recognise(row, answered=False)
    assert found is not None, "the row was read before"
    messages = found[1].messages
    pictures, _ = _pictures(row)
    first_answer = {"role": "assistant", "content": "-"}
    return read_chat([*messages, first_answer], pictures, True, source.reading.ignore).images
