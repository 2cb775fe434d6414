"""OpenAI's chat completions, as far as they are served here: the request, checked.

What is not served is refused with the parameter's name, unless the value given is the one that means "off".
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from keepsight.serve.errors import ApiError, bad

_MAX_STOP_LENGTH = 256
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where an image is. `detail` "low" is refused: images are always read in full."""

    url: str
    detail: Literal["auto", "high"] = "auto"


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileReference(_Strict):
    """An uploaded image."""

    file_id: str


class FilePart(_Strict):
    """An uploaded image of a message."""

    type: Literal["file"]
    file: FileReference


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn. An answer's `message` can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    parts: list[Part] = Field(alias="content")
    name: str | None = None  # a label; no template knows it
    annotations: list[Any] = Field(default_factory=list)
    tool_calls: list[Any] = Field(default_factory=list)

    @field_validator("annotations", "tool_calls")
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

    @model_validator(mode="after")
    def _images_are_the_users(self) -> Message:
        if self.role != "user" and any(not isinstance(part, TextPart) for part in self.parts):
            raise ValueError(f"a message of role {self.role!r} can hold text only; images belong to role 'user'")
        return self


class StreamOptions(_Strict):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Extension(_Strict):
    """What keepsight adds: `extra_body={"keepsight": {"memory": false}}`."""

    memory: bool | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]


class ChatRequest(_Strict):
    """The body of /v1/chat/completions."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict, max_length=1024)
    keepsight: Extension = Field(default_factory=Extension)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _stop_texts(cls, value: list[str]) -> list[str]:
        if any(not 0 < len(text) <= _MAX_STOP_LENGTH for text in value):
            raise ValueError(f"expected texts of 1 to {_MAX_STOP_LENGTH} characters")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's; there is nothing to answer")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


#: Parameters of OpenAI's that are not served, with the values that switch them off; those are accepted.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (False, True),  # says something about tools only
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
#: Parameters that label a request and change no answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")


def parse(body: bytes) -> ChatRequest:
    """A checked request.

    Raises:
        ApiError: 400, with the parameter at fault.
    """
    try:
        data = json.loads(body, parse_constant=_no_constant)
        if _HALF_CHARACTER.search(body):  # whole pairs are fine; half ones can be neither tokenized nor sent back
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        message = "The body is not valid JSON, or holds half a character (a lone surrogate)."
        raise bad(message, code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad("The body must be a JSON object.", code="invalid_json")
    data = {name: value for name, value in data.items() if value is not None and name not in LABELS}
    for name, off in UNSERVED.items():
        if name in data and data.pop(name) not in off:
            raise bad(f"{name} is not supported by this server; leave it out.", name, "unsupported_parameter")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        raise _explained(error) from None
    except RecursionError:
        raise bad("The body is nested too deeply.", code="invalid_json") from None


def _no_constant(name: str) -> Any:
    raise ValueError(name)


#: What pydantic says in words of Python.
_PLAINER = {
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "union_tag_invalid": "type must be 'text', 'image_url' or 'file'",
    "union_tag_not_found": "expected an object with a type: 'text', 'image_url' or 'file'",
    "missing": "this is missing",
}


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = list(first["loc"])
    if len(place) > 4 and place[2] == "content":
        del place[4]  # the kind of a part stands in pydantic's path and not in the client's
    param = ".".join(map(str, place)) or None
    unknown = first["type"] == "extra_forbidden"
    if unknown:
        message = f"Unknown parameter {param}; this server does not know it."
    else:
        text = _PLAINER.get(first["type"], first["msg"]).removeprefix("Value error, ")
        message = f"{param}: {text[:1].lower()}{text[1:]}." if param else f"{text[:1].upper()}{text[1:]}."
    return bad(message, param, "unknown_parameter" if unknown else "invalid_value")
