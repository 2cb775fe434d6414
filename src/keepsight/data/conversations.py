"""Conversations in one form: every content a list of parts, one image part per image, an answer at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepsight.data.errors import DataError
from keepsight.data.tables.json_values import as_json, without_none
from keepsight.words import counted

_ROLES = ("system", "user", "assistant", "tool")
_ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
    "developer": "system",
}
"""Other formats' names of the roles."""
_MARK = re.compile(r"<image(?:[ _]?(\d+))?>|<img>([^<>]+)</img>")
"""Where an image stands in plain text; with a number, which one; in Qwen-VL's first form, its file."""
_OTHER_MARKS = ("<video>", "<audio>")
_OTHER_PARTS = ("video", "video_url", "input_video", "audio", "audio_url", "input_audio")
TEMPLATE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
"""Keys of a message that some chat templates write."""
_WEIGHTS = ("weight", "train", "loss", "loss_weight", "loss_scale")
_MEANT = ("audio", "images", "videos", "image", "video", "refusal")
"""Keys of a message whose loss would change what it says."""


@dataclass(frozen=True)
class _Numbered:
    """The place of an image that is named by its number."""

    number: int


@dataclass
class Chat:
    """A conversation and its images.

    Attributes:
        messages: {"role", "content": list of {"type": "image"} and {"type": "text", "text"}}; also keys of
            `TEMPLATE_KEYS`, and "weight": 0 where a message is not to be learned.
        images: as found, in the order of their parts.
        ignored: keys that were found and are not used.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    ignored: set[str] = field(default_factory=set)


def read_chat(messages: Any, images: Sequence[Any], answered: bool = True, ignore: Sequence[str] = ()) -> Chat:
    """A chat in which every content is a list of parts, with one image part per image.

    User messages that are plain text mark images by `<image>`; without any mark, the images stand before the text of
    the first user message. Parts may hold their images themselves. What the assistant says is text, `<image>` too.

    Args:
        messages: list of {"role", "content"} or {"from", "value"}; content is text or a list of parts.
        images: those that are not inside the messages.
        answered: whether the last message must be the assistant's (to learn from), or the user's (to answer).
        ignore: keys of messages and types of parts that are to be left out.

    Raises:
        DataError: naming the message, if the chat has no such form.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"messages: {'empty' if not messages else f'expected a list, found {messages!r:.60}'}")
    reader = _Reader(ignore)
    kept = [(index, message) for index, message in enumerate(messages) if not reader.left_out(message)]
    result = [reader.message(index, message) for index, message in kept]
    _check_turns(result, answered)
    return Chat(result, reader.placed(result, list(images), [m for _, m in kept]), reader.ignored)


class _Reader:
    """Reads the messages of one conversation, and remembers what it found on the way."""

    def __init__(self, ignore: Sequence[str]):
        self.ignore, self.ignored = ignore, set[str]()
        self.held: list[Any] = []  # an image inside the messages, or None for a part that only marks one

    def left_out(self, message: Any) -> bool:
        """Whether it is the system's, and these are to be ignored."""
        said = (message.get("role") or message.get("from")) if isinstance(message, dict) else None
        out = "system" in self.ignore and _ROLE_OF.get(str(said), said) == "system"
        self.ignored |= {"messages of the system"} if out else set()
        return out

    def message(self, index: int, message: Any) -> dict[str, Any]:
        found = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        role_key, content_key = ("from", "value") if "from" in found else ("role", "content")
        if found.get(role_key) == "function_call":  # ShareGPT's form of a call, as text
            found |= {content_key: "", "function_call": as_json(found.get(content_key), f"messages[{index}]")}
        if "function_call" in found and "function_call" not in self.ignore:  # OpenAI's first form of one
            found["tool_calls"] = _calls(found.pop("function_call"), index)
        if role_key not in found or (content_key not in found and not found.get("tool_calls")):
            raise DataError(f'messages[{index}]: expected {{"role": ..., "content": ...}}, found {message!r:.60}')
        said = str(found[role_key])
        role = _ROLE_OF.get(said, said)
        if role not in _ROLES:
            raise DataError(f"messages[{index}]: role {said!r}; expected one of {', '.join(_ROLES)}")
        content = list(self._parts(found.get(content_key, ""), index, role))
        return {"role": role, "content": content, **self._more(found, index, role, (role_key, content_key))}

    def _more(self, found: dict[str, Any], index: int, role: str, known: Sequence[str]) -> dict[str, Any]:
        more: dict[str, Any] = {}
        for key, value in found.items():
            if key in known or value in ([], {}, ""):
                continue
            if key in self.ignore:
                self.ignored.add(f"{key} of messages")
            elif key in _WEIGHTS and role == "assistant":
                if value not in (0, 1):
                    raise DataError(
                        f"messages[{index}]: {key} {value!r}; a message is learned (1) or not (0)",
                        f"To learn all the same, whatever their {key}: --ignore {key}.",
                    )
                more |= {} if value else {"weight": 0}
            elif key in TEMPLATE_KEYS:
                more[key] = without_none(value)
            elif key in _MEANT:
                raise DataError(
                    f"messages[{index}]: {key}, which training cannot use",
                    f"To train without it: --ignore {key}.",
                )
            else:
                self.ignored.add(f"{key} of messages")
        return more

    def _parts(self, content: Any, index: int, role: str) -> Iterator[dict[str, Any]]:
        if isinstance(content, str):
            yield from self._marked(content, index, role)
            return
        if isinstance(content, dict):
            content = [content]
        if not isinstance(content, (list, tuple)):
            raise DataError(f"messages[{index}]: content must be text or a list of parts, found {content!r:.60}")
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            part = {key: v for key, v in part.items() if v is not None} if isinstance(part, dict) else {}
            kind = part.get("type") or next((key for key in ("text", "image", "video") if key in part), None)
            if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
                self.ignored |= {f"{key} of text parts" for key in part if key not in ("type", "text")}
                yield {"type": "text", "text": part["text"]}
            elif kind in ("image", "image_url", "input_image"):
                self.held.append(self._image(part))
                yield {"type": "image"}
            elif kind in self.ignore:
                self.ignored.add(f"parts of type {kind}")
            elif kind in _OTHER_PARTS:
                raise DataError(
                    f"messages[{index}]: a part of type {kind}; training reads pictures only",
                    f"Give frames as images, where the model takes videos too; or leave it out: --ignore {kind}.",
                )
            else:
                raise DataError(
                    f'messages[{index}]: expected parts {{"type": "text", "text": ...}} or {{"type": "image"}}, '
                    f"found {part or content!r:.60}",
                    f"To leave such parts out: --ignore {kind}." if kind else "",
                )

    def _marked(self, content: str, index: int, role: str) -> Iterator[dict[str, Any]]:
        """Text as parts; only a user's text has marks in it."""
        if role != "user":
            yield from [{"type": "text", "text": content}] if content else []
            return
        for mark in _OTHER_MARKS:
            if mark in content and mark[1:-1] not in self.ignore:
                raise DataError(
                    f"messages[{index}]: {mark} in the text; training reads pictures only",
                    f'Give frames as "images". If {mark} is a word of the question, write contents as parts '
                    f'({{"type": "text", "text": ...}}), or: --ignore {mark[1:-1]}.',
                )
        marks = [*_MARK.finditer(content)]
        ends = [0, *(mark.end() for mark in marks)]
        for place, begin in enumerate(ends):
            found = marks[place] if place < len(marks) else None
            text = content[begin : None if found is None else found.start()]
            if text := text.strip() if marks else text:
                yield {"type": "text", "text": text}
            if found is not None:
                number, file = found.groups()
                self.held.append(file.strip() if file else None if number is None else _Numbered(int(number)))
                yield {"type": "image"}

    def _image(self, part: dict[str, Any]) -> Any:
        """The image that a part holds; None if it only marks the place of one."""
        keys = ("image", "image_url", "url", "path", "base64", "data", "source")
        key = next((key for key in keys if part.get(key) is not None), None)
        others = {other for other in part if other not in ("type", key)}
        found = part.get(key or "")
        if isinstance(found, dict):
            if found.get("type") == "base64" and isinstance(found.get("data"), str):  # Anthropic's form
                return found["data"]
            if isinstance(found.get("url"), str):
                others |= set(found) - {"url"}
                found = found["url"]
        self.ignored |= {f"{other} of image parts" for other in others if part.get(other, True) is not None}
        return found

    def placed(self, result: list[dict[str, Any]], images: list[Any], messages: Any) -> list[Any]:
        """All images in the order of their parts; puts parts where nothing marks any."""
        users = [message for message in result if message["role"] == "user"]
        if not self.held and images and users:
            asked = [message for message, made in zip(messages, result, strict=True) if made["role"] == "user"]
            if all(isinstance(_content(message), str) for message in asked):
                users[0]["content"][:0] = [{"type": "image"}] * len(images)
                return images
            marked = sum(len(_MARK.findall(part["text"])) for m in users for part in m["content"])
            if marked == len(images):
                for message in users:
                    texts, message["content"] = message["content"], []
                    for part in texts:
                        message["content"] += self._marked(part["text"], 0, "user")
        numbers = [image.number for image in self.held if isinstance(image, _Numbered)]
        begin = min(numbers, default=0)  # from 1 (MMMU) or 0 (MiniCPM-V)
        all_of_them = begin < 2 and set(numbers) == set(range(begin, begin + len(images)))
        if numbers and len(numbers) == len(self.held) and all_of_them:
            return [images[number - begin] for number in numbers]
        self.held = [None if isinstance(image, _Numbered) else image for image in self.held]
        marks = len(self.held)
        inside = [image for image in self.held if image is not None]
        if inside and len(inside) == marks and images:
            if images == inside:
                return images
            raise DataError(
                f"images: {counted(len(inside), 'image')} inside the messages and {len(images)} beside them; which are "
                "meant?",
                'Leave out those beside the messages: --ignore images. Or write parts as {"type": "image"}.',
            )
        if marks - len(inside) != len(images):
            raise DataError(
                f"messages: {counted(marks - len(inside), 'image placeholder')} for {counted(len(images), 'image')}; "
                'each image needs one part {"type": "image"} (or <image> in plain text) in a user message'
            )
        rest = iter(images)
        return [next(rest) if image is None else image for image in self.held]


_HALF = re.compile("[\ud800-\udfff]")
"""Of characters that JSON writes as two escapes; one alone is none."""


def _content(message: dict[str, Any]) -> Any:
    found = message.get("value") if message.get("from") is not None else message.get("content")
    return "" if found is None else found  # beside tool calls there may be none


def _check_turns(result: list[dict[str, Any]], answered: bool) -> None:
    last = result[-1]["role"]
    if not answered and last not in ("user", "tool"):
        raise DataError(
            f"messages: the last message is the {last}'s; it must be the user's, whose question the model will answer"
        )
    if answered and last != "assistant":
        raise DataError(
            f"messages: the last message is the {last}'s; it must be the assistant's, whose words are what training "
            "teaches"
        )
    for index, message in enumerate(result):
        for part in message["content"]:
            half = _HALF.search(part.get("text", ""))
            if half:
                raise DataError(
                    f"messages[{index}]: half of a character (\\u{ord(half[0]):04x}) in the text",
                    "Write such characters whole; a text was cut within one.",
                )
        if any(part["type"] == "image" for part in message["content"]) and message["role"] != "user":
            raise DataError(f"messages[{index}]: an image in the {message['role']}'s message; models answer in text")
        says = message.get("tool_calls") or any(part["text"].strip() for part in message["content"] if "text" in part)
        if message["role"] == "assistant" and not says:
            raise DataError(f"messages[{index}]: the assistant's message is empty")
    if answered and all(message.get("weight", 1) == 0 for message in result if message["role"] == "assistant"):
        raise DataError(
            "messages: the weight of every answer is 0, so there is nothing to learn",
            "To learn them all the same: --ignore weight (or train, loss: the key that says so).",
        )


def _calls(found: Any, index: int) -> list[dict[str, Any]]:
    """Calls of functions as chat templates take them, of {"name", "arguments"} or a list of these."""
    calls = []
    for call in found if isinstance(found, (list, tuple)) else [found]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(f'messages[{index}]: expected a call {{"name": ..., "arguments": ...}}, found {call!r:.60}')
        asked = call.get("arguments")
        asked = as_json(asked, f"messages[{index}]: arguments") if isinstance(asked, str) and asked else asked
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": asked or {}}})
    return calls
