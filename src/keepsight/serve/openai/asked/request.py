"""OpenAI's chat completions, as far as they are served here: the request, checked.

What is not served is refused with the parameter's name, unless the value given is the one that means "off".
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from keepsight.serve.errors import ApiError, bad
from keepsight.serve.openai.asked import messages as spoken
from keepsight.serve.openai.asked import tools as called
from keepsight.serve.openai.asked.messages import Message, Strict, check_messages
from keepsight.serve.openai.asked.tools import Tool
from keepsight.serve.openai.asked.unserved import LABELS, UNSERVED

_MAX_STOP_LENGTH = 256
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False

    @field_validator("include_obfuscation")
    @classmethod
    def _plain(cls, value: bool) -> bool:
        if value:
            raise ValueError("expected False; streams are not padded here")
        return value


class Extension(Strict):
    """What keepsight adds: `extra_body={"keepsight": {"memory": false}}`."""

    memory: bool | None = None


class JsonSchema(Strict):
    """A JSON schema. `name` and `description` label it; an answer is held to it, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON of one schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's: the whole answer matches `regex` (Rust's syntax). JSON goes by `response_format`."""

    regex: Annotated[str, Field(min_length=1, max_length=16_384)]


Penalty = Annotated[float, Field(ge=-2, le=2)]


class ChatRequest(Strict):
    """The body of /v1/chat/completions. `top_k`, `min_p` and `repetition_penalty` are vLLM's and transformers'."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
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
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    keepsight: Extension = Field(default_factory=Extension)

    @field_validator("response_format")
    @classmethod
    def _text_is_free(cls, value: Any) -> Any:
        return None if isinstance(value, TextFormat) else value

    @field_validator("tool_choice")
    @classmethod
    def _free(cls, value: Any) -> Any:
        if value not in ("auto", "none"):
            raise ValueError("expected 'auto' or 'none'; no call can be forced here")
        return value

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

    @property
    def length(self) -> tuple[str, int | None]:
        """(what the client calls the limit of an answer's length, the limit if it gave one)."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def schema_asked(self) -> tuple[str, dict[str, Any]] | None:
        """(where the schema stands that the answer is held to, the schema)."""
        if isinstance(self.response_format, SchemaFormat):
            return "response_format.json_schema.schema", self.response_format.json_schema.schema_
        return None if self.response_format is None else ("response_format", {"type": "object"})

    @property
    def offered(self) -> list[Tool]:
        """The tools that the model may ask for."""
        return self.tools if self.tool_choice == "auto" else []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


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
    for name, (off, instead) in UNSERVED.items():
        if name in data and data.pop(name) not in off:
            raise bad(f"{name} is not supported by this server: {instead}.", name, "unsupported_parameter")
    try:
        asked = ChatRequest.model_validate(data)
        check_messages(asked.messages)
    except ValidationError as error:
        raise _explained(error) from None
    except RecursionError:
        raise bad("The body is nested too deeply.", code="invalid_json") from None
    _check_together(asked)
    return asked


def _check_together(asked: ChatRequest) -> None:
    """What is wrong only beside something else."""
    if asked.top_logprobs and not asked.logprobs:
        raise bad("top_logprobs has no effect without logprobs: true.", "top_logprobs", "invalid_value")
    if asked.stream_options is not None and not asked.stream:
        raise bad("stream_options has no effect without stream: true.", "stream_options", "invalid_value")
    held = [name for name in ("response_format", "structured_outputs") if getattr(asked, name) is not None]
    if len(held) > 1:
        raise bad("structured_outputs: response_format holds the answer already. Send one.", held[1], "invalid_value")
    if held and asked.offered:
        raise bad(f"{held[0]}: an answer that is held to a form can call no tool. Send one.", held[0], "invalid_value")
    if asked.tools and not asked.parallel_tool_calls:
        raise bad(
            "parallel_tool_calls: expected True; the model decides how many calls it makes.",
            "parallel_tool_calls",
            "invalid_value",
        )
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise bad(
            "max_tokens and max_completion_tokens differ; send one of them.", "max_completion_tokens", "invalid_value"
        )


def _no_constant(name: str) -> Any:
    raise ValueError(name)


#: What pydantic says in words of Python.
_PLAINER = {
    "missing": "this is missing",
}
_ASKED: dict[str, Any] = {name: getattr(spoken, name) for name in vars(spoken)} | vars(called) | dict(globals())
#: What a parameter can be called, anywhere in a request.
_NAMES = {
    field.alias or name
    for model in _ASKED.values()
    if isinstance(model, type) and issubclass(model, BaseModel)
    for name, field in model.model_fields.items()
} | set(UNSERVED)


def _explained(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    place = [step for step in first["loc"] if step != "[key]"]  # of an object's name, not of its value
    # The kind of a part (of a format) stands in pydantic's path and not in the client's.
    if len(place) > 4 and place[2] == "content":
        del place[4]
    elif len(place) > 1 and place[0] == "response_format":
        del place[1]
    param = ".".join(map(str, place)) or None
    if kind == "extra_forbidden":
        alike = difflib.get_close_matches(str(place[-1]).lower(), _NAMES, 1, 0.8)
        hint = f" Did you mean {alike[0]}?" if alike else ""
        return bad(f"Unknown parameter {param}; this server does not know it.{hint}", param, "unknown_parameter")
    if kind == "union_tag_invalid":
        text = f"type must be one of {context['expected_tags']}"
    elif kind == "union_tag_not_found":
        text = "expected an object with a type"
    elif kind in ("model_type", "model_attributes_type"):
        fields = getattr(_ASKED.get(str(context.get("class_name"))), "model_fields", {})
        needed = [field.alias or name for name, field in fields.items() if field.is_required()]
        text = f"expected an object{' with ' * bool(needed)}{', '.join(needed)}"
    else:
        text = _PLAINER.get(kind, first["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    message = f"{param}: {text[:1].lower()}{text[1:]}." if param else f"{text[:1].upper()}{text[1:]}."
    return bad(message, param, "invalid_value")
