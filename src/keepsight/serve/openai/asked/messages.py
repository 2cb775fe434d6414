"""The messages of a request: who says what, with which images, videos and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from keepsight.serve.errors import bad


class Strict(BaseModel):
    """What clients send: nothing unknown, and null is the same as not given."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class TextPart(Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


#: The longer side of an image that is asked to be read in low detail, in pixels: OpenAI's.
LOW = 512


class ImageUrl(Strict):
    """Where an image is. With `detail` "low" it is made smaller first, as OpenAI does: `LOW` pixels a side at most."""

    url: str
    detail: Literal["auto", "high", "low"] = "auto"


class ImagePart(Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileReference(Strict):
    """An uploaded image."""

    file_id: str


class FilePart(Strict):
    """An uploaded image of a message."""

    type: Literal["file"]
    file: FileReference


class VideoUrl(Strict):
    """Where a video is: its frames, or one animated image. `fps` is frames per second."""

    url: str
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None


class VideoPart(Strict):
    """A video of a message."""

    type: Literal["video_url"]
    video_url: VideoUrl


Part = Annotated[TextPart | ImagePart | FilePart | VideoPart, Field(discriminator="type")]


class FunctionCall(Strict):
    """What the model asked a tool for; `arguments` is a JSON object, as text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """One call, as an earlier answer held it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn. An answer's `message` can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    parts: list[Part] | None = Field(None, alias="content")
    name: str | None = None  # a label; no template knows it
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None

    @field_validator("annotations")
    @classmethod
    def _none(cls, value: list[Any]) -> list[Any]:
        if value:
            raise ValueError("not supported by this server; leave it out")
        return value

    @field_validator("parts", mode="before")
    @classmethod
    def _text_is_a_part(cls, value: Any) -> Any:
        if not isinstance(value, (str, list)):
            raise ValueError("expected text, or a list of parts")
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    @property
    def content(self) -> list[Any]:
        """Its parts; none for a turn that only calls tools."""
        return self.parts or []


def check_messages(messages: Sequence[Message]) -> None:
    """What a message may hold depends on who says it, and on what was said before.

    Raises:
        ApiError: 400, with the place at fault.
    """
    called: set[str] = set()
    for m, message in enumerate(messages):
        place = f"messages.{m}"
        if message.parts is None and not message.tool_calls:
            raise bad(f"{place}.content: this is missing.", f"{place}.content", "invalid_value")
        for p, part in enumerate(message.content):
            if message.role != "user" and not isinstance(part, TextPart):
                raise bad(
                    f"{place}.content.{p}: a message of role {message.role!r} can hold text only; images and videos "
                    "belong to role 'user'.",
                    f"{place}.content.{p}",
                    "invalid_value",
                )
        if message.tool_calls and message.role != "assistant":
            raise bad(f"{place}.tool_calls: only role 'assistant' calls.", f"{place}.tool_calls", "invalid_value")
        for t, call in enumerate(message.tool_calls):
            read_arguments(call, f"{place}.tool_calls.{t}.function.arguments")
            called.add(call.id)
        if (message.tool_call_id is not None) != (message.role == "tool"):
            what = "this is missing" if message.role == "tool" else "it belongs to role 'tool' only"
            raise bad(f"{place}.tool_call_id: {what}.", f"{place}.tool_call_id", "invalid_value")
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise bad(
                f"{place}.tool_call_id: no assistant's turn before it has a call of this id in its tool_calls.",
                f"{place}.tool_call_id",
                "invalid_value",
            )
    last = f"messages.{len(messages) - 1}"
    if messages[-1].role == "assistant":
        raise bad(
            f"{last}.role: the last message is the assistant's; there is nothing to answer.",
            f"{last}.role",
            "invalid_value",
        )


def read_arguments(call: ToolCall, place: str) -> dict[str, Any]:
    """The arguments of a call as an object, which chat templates expect.

    Raises:
        ApiError: 400 if they are none.
    """
    try:
        found = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise bad(f"{place}: expected a JSON object, as text.", place, "invalid_value")
    return found
