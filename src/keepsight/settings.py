"""What kind of value a setting takes, told by its annotation: a word is no number, and "false" is not false."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Collection
from typing import Any

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "None",
}


def check_kinds(cls: type, given: dict[str, Any]) -> None:
    """Refuse values of another kind than a dataclass says of the fields that it defines itself.

    Args:
        cls: the dataclass. Fields it inherits, and annotations other than of plain values and lists, are not looked at.
        given: name of a field -> value.

    Raises:
        ValueError: naming the setting and what is expected.
    """
    hints = typing.get_type_hints(cls)
    for name in given.keys() & inspect.get_annotations(cls).keys():
        if not _fits(given[name], hints[name]):
            raise ValueError(f"{name}={given[name]!r}: expected {_in_words(hints[name])}.")


def _fits(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        is_list = isinstance(value, Collection) and not isinstance(value, (str, bytes, dict))
        return is_list and all(_fits(item, options[0]) for item in value)
    if typing.get_origin(hint) is typing.Literal:
        return True  # who defines it says more of each
    if options:
        return any(_fits(value, option) for option in options)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else True


def _in_words(hint: Any) -> str:
    if typing.get_origin(hint) is list:
        items = _in_words(typing.get_args(hint)[0]).partition(" ")[2]
        return f"a list of {items}s"
    return " or ".join(map(_in_words, typing.get_args(hint))) or _WORDS.get(hint, str(hint))
