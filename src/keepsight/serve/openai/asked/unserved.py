"""Parameters that other servers know and this one does not."""

from __future__ import annotations

from typing import Any

_LEAVE_OUT = "leave it out"

#: Parameter -> (values that switch it off, which are accepted; what to do instead).
UNSERVED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "it answers in text"),
    "extra_body": ((), "it is an argument of the Python client; what it holds stands beside the other parameters"),
    "function_call": (("none",), "send tools and tool_choice, which replaced it"),
    "functions": (([],), "send tools, which replaced it"),
    "guided_json": ((), "send response_format, with type json_schema"),
    "guided_regex": ((), "send structured_outputs, with a regex"),
    "modalities": ((["text"],), "it answers in text"),
    "moderation": ((), _LEAVE_OUT),
    "prediction": ((), _LEAVE_OUT),
    "prompt_cache_options": ((), "it has no prompt cache"),
    "prompt_cache_retention": ((), "it has no prompt cache"),
    "reasoning_effort": (("none",), _LEAVE_OUT),
    "service_tier": (("auto", "default"), _LEAVE_OUT),
    "store": ((False,), "it stores nothing"),
    "verbosity": (("medium",), _LEAVE_OUT),
    "web_search_options": ((), "it searches nothing"),
}
#: Parameters that label a request and change no answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")
