"""Is an answer right? The last answer that a text gives, compared as rewards compare it."""

from __future__ import annotations

import re
from typing import Any, Literal

from keepsight.train.rewards.answers import same_answer

Match = Literal["answer", "contains", "exact"]
RULES: dict[Match, str] = {
    "answer": "the last <answer>, \\boxed{} or 'answer is', else the whole text; numbers and formulas by value",
    "contains": "the reference's words, in a row, anywhere in the text",
    "exact": "the same characters",
}
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SAID = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)\s*:?\s*(.+?)(?:\n|$)", re.IGNORECASE)


def final_answer(text: str) -> str:
    """What a text gives as its answer."""
    tagged = _TAGGED.findall(text)
    if tagged:
        return tagged[-1].strip()
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    said = _SAID.findall(text)
    return (said[-1] if said else text).strip()


def _boxed(text: str) -> str | None:
    """The content of the last whole \\boxed{...}."""
    start = text.rfind("\\boxed{")
    depth = 0
    for place in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def is_right(text: str, reference: Any, match: Match = "answer") -> bool:
    """Whether a text answers as the reference does; of a list of references any may be met."""
    references = reference if isinstance(reference, (list, tuple)) else [reference]
    if match == "exact":
        return any(text.strip() == str(one).strip() for one in references)
    if match == "contains":
        said = _words(text)
        return any(f" {_words(str(one))} " in f" {said} " for one in references if _words(str(one)))
    return same_answer(final_answer(text), references)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))
