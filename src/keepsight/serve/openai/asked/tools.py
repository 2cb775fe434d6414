"""Tools: what the chat template is told of them, and the calls that an answer's text holds.

A template that has tools also writes earlier calls, and so shows how its model asks for one. Two forms are read:

    <tool_call>{"name": ..., "arguments": {...}}</tool_call>        (Hermes; Qwen2.5, Qwen3, InternVL3 and others)
    <tool_call><function=NAME><parameter=NAME>VALUE</parameter>...</function></tool_call>                (Qwen3.5)

The calls of models that ask in another form stay text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from keepsight.serve.openai.asked.messages import Strict

_BEGIN, _END = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{_BEGIN}\s*(.*?)\s*{_END}", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class Function(Strict):
    """What a tool does; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False

    @field_validator("strict")
    @classmethod
    def _not_held(cls, value: bool) -> bool:
        if value:
            raise ValueError("expected False; calls are not held to their schema here. Check their arguments")
        return value


class Tool(Strict):
    """A tool that the model may ask for."""

    type: Literal["function"]
    function: Function

    def described(self) -> dict[str, Any]:
        """As chat templates take it: as it was sent."""
        return self.model_dump(exclude_unset=True)


def asks_in_known_form(processor: Any) -> bool:
    """Whether the chat template writes calls of tools in the form that is read here."""
    call = {"name": "look_up", "arguments": {"word": "memory"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [], "tool_calls": [{"type": "function", "function": call}]},
    ]
    try:
        text = processor.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise what they like for what they do not know
        return False
    return [_read(found, {}) for found in _CALL.findall(text)] == [call]


def _read(text: str, types: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """A call, or None where the text is none.

    Args:
        text: between the marks.
        types: tool -> parameter -> its type, where it has one: parameters in tags do not say whether `7` is a number.
    """
    function = _FUNCTION.fullmatch(text)
    if function is not None:
        known = types.get(function[1], {})
        arguments = {name: _value(value, known.get(name, "string")) for name, value in _PARAMETER.findall(function[2])}
        return {"name": function[1], "arguments": arguments}
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_call = isinstance(call, dict) and isinstance(call.get("name"), str)
    if not is_call or not isinstance(call.setdefault("arguments", {}), dict):
        return None
    return call


def _value(text: str, kind: Any) -> Any:
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class CallReader:
    """The text of one answer, parted into what is said and what is called.

    Args:
        tools: those that were offered. What asks for any other, or is no call after all, stays text.
    """

    def __init__(self, tools: Sequence[Tool]):
        self._held = ""
        self._types: dict[str, dict[str, Any]] = {}
        for function in (tool.function for tool in tools):
            given = (function.parameters or {}).get("properties")
            given = given if isinstance(given, dict) else {}
            self._types[function.name] = {n: about.get("type") for n, about in given.items() if isinstance(about, dict)}

    def push(self, text: str) -> str:
        """Add text; returns what is certain to be said."""
        self._held += text
        begin = self._held.find(_BEGIN)
        if begin < 0:  # the end may turn out to begin a call
            sizes = range(len(_BEGIN) - 1, 0, -1)
            begin = len(self._held) - next((n for n in sizes if self._held.endswith(_BEGIN[:n])), 0)
        said = self._held[:begin].rstrip()  # space before a call belongs to neither
        self._held = self._held[len(said) :]
        return said

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest, when the answer is complete: (what is said, calls as OpenAI writes them)."""
        calls: list[dict[str, Any]] = []

        def take(found: re.Match[str]) -> str:
            call = _read(found[1], self._types)
            if call is None or call["name"] not in self._types:
                return found[0]
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
            return ""

        rest = _CALL.sub(take, self._held)
        return (rest if rest.strip() or not calls else ""), calls
