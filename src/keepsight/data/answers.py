"""A cell's answer as text: one of words, a number, an object or a message; or several, any of which is right."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.formats import filled
from keepsight.data.tables.json_values import as_json


def _is_turn(one: Any) -> bool:
    """Whether it is a message."""
    return isinstance(one, dict) and ({"role", "content"} <= set(one) or {"from", "value"} <= set(one))


def text_of(content: Any) -> Any:
    """The text of a message's content, also of one in parts."""
    if not isinstance(content, list):
        return content
    return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))


def _words(one: Any) -> Any:
    """What an answer says that is an object: VQA's, or a message."""
    if not isinstance(one, dict):
        return one
    return text_of(next((one[key] for key in ("answer", "content", "value") if key in one), one))


def said(answer: Any) -> tuple[str, str]:
    """(an answer as text to learn, a note if that was chosen among several)."""
    found = references(answer)
    return found[0] if found else "", "of several answers, the most frequent" if len(found) > 1 else ""


def references(answer: Any) -> tuple[str, ...]:
    """An answer as text; of several any of which is right (VQA, DocVQA), each once, the most frequent first."""
    if isinstance(answer, str):
        answer = _several_in(answer)
    several = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    if len(several) > 1 and all(isinstance(one, (int, float)) for one in several):
        raise DataError(
            f"answer: numbers alone, {several!r:.60}: several answers any of which is right, or one (a box)?",
            f'Write several answers as words: {[str(several[0]), "..."]}; one as text: "{several!r:.30}".',
        )
    if several and all(_is_turn(one) for one in several):
        several = several[-1:]
    texts = [_text(_words(one)) for one in several]
    return tuple(text for text, _ in Counter(text for text in texts if text.strip()).most_common())


def _several_in(text: str) -> Any:
    """The answers of a list in JSON; any other text as it is, a box "[1, 2, 3, 4]" too."""
    if text[:1] != "[":
        return text
    try:
        found = as_json(text, "answer")
    except DataError:
        return text
    return found if isinstance(found, list) and all(isinstance(one, (str, dict)) for one in found) else text


def _text(answer: Any) -> str:
    """Words or a number, as text."""
    if not filled(answer):
        return ""
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    if not isinstance(answer, str):
        raise DataError(
            f"answer: expected text, found {answer!r:.60}",
            "An answer is what the model is to say: words, a number, or several in a list.",
        )
    return answer
