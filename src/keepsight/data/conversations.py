"""Conversations in one form: every content a list of parts, one image part per image, an answer at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keepsight.errors import KeepsightError

_ROLES = ("system", "user", "assistant")
_PLACEHOLDER = "<image>"


class DataError(KeepsightError):
    """The training data cannot be used as they are.

    Args:
        message: what is wrong.
        hint: what to do about it, said once however many samples have the same problem.
    """

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.hint = hint


def normalise_messages(messages: Any, num_images: int, answered: bool = True) -> list[dict[str, Any]]:
    """A chat in which every content is a list of parts, with one image part per image.

    Contents that are plain text may mark images by `<image>`; without any mark, the images stand before the text of the
    first user message.

    Args:
        messages: list of {"role", "content"}; content is text or a list of parts.
        num_images: how many images the sample has.
        answered: whether the last message must be the assistant's (to learn from), or the user's (to answer).

    Raises:
        DataError: naming the message, if the chat has no such form.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages: {'empty' if not messages else f'expected a list, found {messages!r:.60}'}")
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f'messages[{index}]: expected {{"role": ..., "content": ...}}, found {message!r:.60}')
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise DataError(f"messages[{index}]: role {role!r}; expected one of {', '.join(_ROLES)}")
        result.append({"role": role, "content": list(_parts(content, index))})
    if not answered and result[-1]["role"] != "user":
        raise DataError(
            f"messages: the last message is the {result[-1]['role']}'s; it must be the user's, whose question the "
            "model will answer"
        )
    if answered and result[-1]["role"] != "assistant":
        raise DataError(
            f"messages: the last message is the {result[-1]['role']}'s; it must be the assistant's, whose words are "
            "what training teaches"
        )
    for index, message in enumerate(result):
        if message["role"] == "assistant":
            if any(part["type"] == "image" for part in message["content"]):
                raise DataError(f"messages[{index}]: an image in the assistant's message; models answer in text")
            if not any(part["text"].strip() for part in message["content"]):
                raise DataError(f"messages[{index}]: the assistant's message is empty")
    marks = sum(part["type"] == "image" for message in result for part in message["content"])
    first_user = next((message for message in result if message["role"] == "user"), None)
    if marks == 0 and num_images and first_user is not None and all(isinstance(m["content"], str) for m in messages):
        first_user["content"][:0] = [{"type": "image"}] * num_images
        marks = num_images
    if marks != num_images:
        raise DataError(
            f"messages: {marks} image placeholder{'s' * (marks != 1)} for {num_images} "
            f'image{"s" * (num_images != 1)}; each image needs one part {{"type": "image"}} in a user message'
        )
    return result


def _parts(content: Any, index: int) -> Iterator[dict[str, Any]]:
    if isinstance(content, str):
        pieces = content.split(_PLACEHOLDER)
        for number, piece in enumerate(pieces):
            if number:
                yield {"type": "image"}
            text = piece.strip() if len(pieces) > 1 else piece
            if text:
                yield {"type": "text", "text": text}
        return
    if not isinstance(content, (list, tuple)):
        raise DataError(f"messages[{index}]: content must be text or a list of parts, found {content!r:.60}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}
        elif kind == "image":
            if any(part.get(key) is not None for key in ("image", "url", "path", "base64")):
                raise DataError(
                    f'messages[{index}]: an image inside the message; put it in the column "images" and leave '
                    '{"type": "image"} here'
                )
            yield {"type": "image"}
        else:
            raise DataError(
                f'messages[{index}]: expected parts {{"type": "text", "text": ...}} or {{"type": "image"}}, '
                f"found {part!r:.60}"
            )
