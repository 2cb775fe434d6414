"""Requests as OpenAI's clients write them, and refusals that name the place at fault."""

import json

import pytest

from keepsight.errors import KeepsightError
from keepsight.serve.errors import ApiError, explain
from keepsight.serve.openai.asked.request import parse


def body(content="read", role="user", **more):
    return {"model": "m", "messages": [{"role": role, "content": content}]} | more


def image(**more):
    return body([{"type": "image_url", "image_url": {"url": "u"} | more}])


def refusal(request):
    with pytest.raises(ApiError) as error:
        parse(json.dumps(request).encode())
    assert error.value.status == 400
    return error.value


def test_an_answers_message_can_be_sent_back_as_it_came():
    own = {"role": "assistant", "content": "a1", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    turns = [{"role": "user", "content": "read", "name": "bob"}, own, {"role": "user", "content": "and?"}]
    parsed = parse(json.dumps({"model": "m", "messages": turns}).encode())
    assert [[part.text for part in message.parts] for message in parsed.messages] == [["read"], ["a1"], ["and?"]]


def test_null_is_not_given():
    image = {"type": "image_url", "image_url": {"url": "data:,", "detail": None}}
    plain = parse(json.dumps(body([image], max_tokens=None, stop=None, keepsight=None)).encode())
    assert plain == parse(json.dumps(body([{"type": "image_url", "image_url": {"url": "data:,"}}])).encode())


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (
            body([{"type": "image_url", "image_url": {"url": "u", "detail": "tiny"}}]),
            "image_url.detail",
            "'auto', 'high' or 'low'",
        ),
        (body([{"type": "image_url", "image_url": "u"}]), "image_url", "expected an object with url"),
        (body([{"type": "image_url", "image_url": {}}]), "image_url.url", "missing"),
        (body([{"type": "image", "image": "u"}]), "", "'text', 'image_url', 'file'"),
        (body([{"text": "read"}]), "", "with a type"),
        (body([{"type": "text", "text": "read", "cache_control": {}}]), "cache_control", "Unknown parameter"),
        (body(["read"]), "", "expected an object"),
        (body([{"type": "file", "file": {"file_data": "x"}}]), "file", "file"),
    ],
)
def test_a_refusal_names_the_part_at_fault(request_, param, words):
    error = refusal(request_)
    assert error.param.startswith(f"messages.0.content.0.{param}".rstrip("."))
    assert words in error.message


@pytest.mark.parametrize(
    ("request_", "param", "words"),
    [
        (body(None), "messages.0.content", "missing"),
        (body(3), "messages.0.content", "expected text"),
        (body(role="critic"), "messages.0.role", "'user'"),
        (
            body(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
            "messages.0.tool_calls.0.id",
            "missing",
        ),
        (body(stream=True, stream_options={"include_obfuscation": True}), "stream_options.include_", "False"),
        (body(logit_bias={"x": 1}), "logit_bias", "integer"),
        ({"model": "m"}, "messages", "missing"),
        ({"messages": body()["messages"]}, "model", "missing"),
    ],
)
def test_a_refusal_names_the_parameter_at_fault(request_, param, words):
    error = refusal(request_)
    assert error.param.startswith(param)
    assert words in error.message


def test_what_a_model_cannot_do_is_the_requests_error():
    error = explain(KeepsightError("This model has no such thing. Ask another."))
    assert (error.status, error.message) == (400, "This model has no such thing. Ask another.")


def test_obfuscation_that_is_off_is_fine():
    options = {"include_usage": True, "include_obfuscation": False}
    assert parse(json.dumps(body(stream=True, stream_options=options)).encode()).include_usage
