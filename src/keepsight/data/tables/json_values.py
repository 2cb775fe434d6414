"""JSON as data files and their cells hold it: nothing lost to a repeated key, each element of a list with its line."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keepsight.data.errors import DataError


class UnusableError(ValueError):
    """A JSON value that can be read in more than one way, or that Python cannot hold."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in found if names.count(key) > 1)
        raise UnusableError(f"the key {twice!r} is there twice in one object; leave one of them out")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_SPACE = re.compile(r"\s*")


def value_of(text: str) -> Any:
    """One JSON value.

    Raises:
        json.JSONDecodeError: if it is none.
        UnusableError: if a key is there twice, or for numbers and nesting beyond Python's limits.
    """
    with _usable():
        return _DECODER.decode(text)


def as_json(cell: Any, column: str) -> Any:
    """A cell that holds a list or an object as text (in CSV, and where datasets store a chat as JSON).

    Raises:
        DataError: if it is no JSON, and not as Python writes lists either.
    """
    if not isinstance(cell, str):
        return cell
    try:
        return value_of(cell)
    except UnusableError as error:
        raise DataError(f"{column}: {error}") from error
    except json.JSONDecodeError as error:
        try:
            return ast.literal_eval(cell.strip())  # what pandas and `str` write: single quotes
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"{column}: expected a list, found text that is not JSON ({error.msg})") from error


def without_none(value: Any) -> Any:
    """Without the keys that Arrow adds where another row has them."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def elements_of(text: str) -> Iterator[tuple[int, Any]]:
    """(the line on which it begins, its value) of each element of a JSON list.

    Raises:
        json.JSONDecodeError, UnusableError: see `value_of`; what was read before is not lost.
    """
    place = _behind_space(text, text.index("[") + 1)
    line, counted, ends = 1, 0, text[place : place + 1] == "]"
    while not ends:
        line, counted = line + text.count("\n", counted, place), place
        with _usable():
            value, end = _DECODER.raw_decode(text, place)
        yield line, value
        place = _behind_space(text, end)
        ends = text[place : place + 1] == "]"
        if not ends:
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
            place = _behind_space(text, place + 1)
    if _behind_space(text, place + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, _behind_space(text, place + 1))


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None
    return found.end()


@contextmanager
def _usable() -> Iterator[None]:
    try:
        yield
    except (json.JSONDecodeError, UnusableError):
        raise
    except RecursionError as error:
        raise UnusableError("it is nested too deeply") from error
    except ValueError as error:  # numbers of more digits than Python converts
        raise UnusableError(str(error).partition(";")[0]) from error
