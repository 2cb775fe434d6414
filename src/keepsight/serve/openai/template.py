"""A conversation as the model's chat template writes it. What is no text must make a difference to it all the same:
templates leave out what they do not know, and say nothing.
"""

from __future__ import annotations

from typing import Any

from keepsight.serve.errors import bad
from keepsight.serve.openai.asked.messages import ToolCall, read_arguments

Turns = list[dict[str, Any]]


def write_prompt(processor: Any, turns: Turns, tools: list[dict[str, Any]]) -> str:
    """The prompt's text.

    Args:
        processor: whose template it is.
        turns: messages as templates take them, with lists of parts.
        tools: likewise; none, if there are none.

    Raises:
        ApiError: 400 if the template does not know something that was given.
        jinja2.TemplateError: if it refuses the messages.
    """

    def write(turns: Turns, tools: list[dict[str, Any]]) -> str:
        more = {"tools": tools} if tools else {}
        return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)

    def must_differ(place: str, turns: Turns, tools: list[dict[str, Any]], instead: str) -> None:
        if write(turns, tools) == text:
            raise bad(
                f"{place}: this model's chat template does not know it; {instead}.", place, "unsupported_parameter"
            )

    text = write(turns, tools)
    if tools:
        must_differ("tools", turns, [], "leave tools out, or describe them in a system message")
    for m, turn in enumerate(turns):

        def changed(m: int = m, turn: dict[str, Any] = turn, **other: Any) -> Turns:
            return [*turns[:m], {**turn, **other}, *turns[m + 1 :]]

        for p, part in enumerate(turn["content"]):
            if part["type"] != "text":
                rest = [*turn["content"][:p], *turn["content"][p + 1 :]]
                place = f"messages.{m}.content.{p}"
                must_differ(place, changed(content=rest), tools, f"it takes no {part['type']} there")
        if turn.get("tool_calls"):
            must_differ(f"messages.{m}.tool_calls", changed(tool_calls=[]), tools, "write the calls as text")
        if turn["role"] == "tool":
            instead = "send what the tool returned as text of role 'user'"
            must_differ(f"messages.{m}.role", changed(role="user"), tools, instead)
            longer = [*turn["content"], {"type": "text", "text": "+"}]
            must_differ(f"messages.{m}.content", changed(content=longer), tools, instead)
    return text


def call_for_template(call: ToolCall, place: str) -> dict[str, Any]:
    """A call as chat templates take it: its arguments as an object."""
    arguments = read_arguments(call, f"{place}.arguments")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
