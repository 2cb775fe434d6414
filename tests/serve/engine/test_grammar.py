"""Answers held to a JSON schema: always JSON of it, streamed or whole, in any company, with memories in between."""

import copy
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Literal

import httpx
import pydantic
import pytest
import torch
from letters import with_letters
from live import NAME, ask, images, serving

import keepsight
from keepsight.serve.errors import ApiError
from keepsight.serve.hf.grammar import Grammars
from keepsight.vismem import add_memory_tokens

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def letters(remembering):
    model, processor = remembering
    with serving(model, with_letters(processor)) as live:
        yield live


@pytest.fixture(scope="module")
def latent_letters(latent):
    """A VisMem that is invoked now and then, on a base that can write JSON."""
    model = latent[0]
    _, processor = keepsight.load("keepsight/reference")
    processor = with_letters(processor)
    add_memory_tokens(processor, model)
    with serving(model, processor) as live:
        yield live


def asked(schema, **more):
    kind = (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}} if schema else {"type": "json_object"}
    )
    return {"model": NAME, "messages": ask(images(1)[0]), "max_tokens": 300, "response_format": kind} | more


def choices(live, body):
    response = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def is_person(text):
    found = json.loads(text)
    assert set(found) == {"name", "age", "tags"}
    assert isinstance(found["name"], str)
    assert type(found["age"]) is int
    assert 0 <= found["age"] <= 120
    assert 1 <= len(found["tags"]) <= 2
    assert set(found["tags"]) <= {"red", "blue"}
    return True


def test_every_answer_is_json_of_the_schema(letters):
    hot = {"temperature": 1.5, "seed": 1, "n": 4, "top_p": 0.95, "top_k": 30, "min_p": 0.001}
    for more in ({}, hot, {"frequency_penalty": 2, "repetition_penalty": 1.3}):
        found = choices(letters, asked(PERSON, **more))
        assert all(choice["finish_reason"] == "stop" and is_person(choice["message"]["content"]) for choice in found)
    assert len({choice["message"]["content"] for choice in choices(letters, asked(PERSON, **hot))}) == 4


def test_requests_with_and_without_a_schema_are_answered_together_as_alone(letters):
    bodies = [asked(PERSON), asked({"enum": ["red", "blue"]}), asked(PERSON, max_tokens=10)]
    bodies += [{name: value for name, value in asked(None).items() if name != "response_format"} | {"max_tokens": 40}]
    alone = [choices(letters, body)[0] for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda body: choices(letters, body)[0], bodies))
    assert together == alone
    assert json.loads(alone[1]["message"]["content"]) in ("red", "blue")
    assert alone[2]["finish_reason"] == "length"  # cut off: the one way not to be JSON


def test_a_json_object_is_one(letters):
    bias = {str(letters.api.served.tokenizer.convert_tokens_to_ids("}")): 20}  # or it would never come to its end
    (choice,) = choices(letters, asked(None, logit_bias=bias))
    assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_a_stream_is_the_whole(letters):
    whole = choices(letters, asked(PERSON))[0]["message"]["content"]
    stream = letters.client().chat.completions.create(**asked(PERSON), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


class Person(pydantic.BaseModel):
    """As an application has it."""

    first: Literal["ada", "bob"]
    numbers: list[Annotated[int, pydantic.Field(ge=0, le=9)]] = pydantic.Field(max_length=3)


def test_the_clients_own_parsing(letters):
    body = {"model": NAME, "messages": ask(images(1)[0]), "max_tokens": 200}
    answer = letters.client().chat.completions.parse(**body, response_format=Person)
    assert answer.choices[0].message.parsed.first in ("ada", "bob")
    assert len(answer.choices[0].message.parsed.numbers) <= 3


def test_memories_go_in_between_and_belong_to_no_grammar(latent_letters):
    invoked = 0
    for seed in range(4):
        (choice,) = choices(latent_letters, asked(PERSON, temperature=1.0, seed=seed))
        assert is_person(choice["message"]["content"])
        inside = [i for i in choice["keepsight"]["invocations"] if i["text_offset"] < len(choice["message"]["content"])]
        invoked += len(inside)
    assert invoked > 4
    off = choices(latent_letters, asked(PERSON, keepsight={"memory": False}))[0]
    assert is_person(off["message"]["content"])
    assert not off["keepsight"]["invocations"]


def test_the_shipped_vismem_can_be_held_to_what_its_words_can_write():
    with serving(*keepsight.load("keepsight/reference-vismem")) as live:
        for seed in range(4):
            (choice,) = choices(live, asked({"type": "integer"}, temperature=1.0, seed=seed))
            assert isinstance(json.loads(choice["message"]["content"]), int)
            assert choice["finish_reason"] == "stop"


def test_white_space_comes_to_an_end(remembering):
    tokenizer = copy.deepcopy(with_letters(remembering[1]).tokenizer)
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    (space,) = tokenizer.encode(" ")
    for before, most in (("[1", 16), ("[1,", 16), ("[", 0)):
        grammar = grammars.compile({"type": "array", "items": {"type": "integer"}}, "p")
        for token in tokenizer.encode(before):
            grammar.write(token)
        count = 0
        while bool(grammar.allowed()[space]) and count < 100:
            grammar.write(space)
            count += 1
        assert count == most


def test_a_dead_end_is_an_error_and_not_an_answer(remembering):
    """`{"Z"` cannot be written without a Z; that is found out where it comes up, and never taken for an end."""
    tokenizer = copy.deepcopy(with_letters(remembering[1]).tokenizer)
    grammar = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).compile({"enum": ["aZ"]}, "p")
    for token in tokenizer.encode('"a'):
        assert bool(grammar.allowed()[token])
        grammar.write(token)
    with pytest.raises(ApiError, match="no token that could come next"):
        grammar.constrained(torch.zeros(1, len(tokenizer)), ())


CELLS = r"a1 [0-9] \. d[1-4] (7|8) \."


@pytest.mark.parametrize("shipped", ["keepsight/reference-pvm", "keepsight/reference-vismem"])
def test_an_answer_matches_a_regular_expression(shipped):
    """Of whole words, whose beginnings can be all that is known of what must come; and of letters."""
    with serving(*keepsight.load(shipped)) as live:
        bodies = [
            asked(None, response_format=None, structured_outputs={"regex": CELLS}, temperature=t) for t in (0, 1.0)
        ]
        for body in bodies:
            (choice,) = choices(live, body)
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(CELLS, choice["message"]["content"])
        for regex, code in (("a1 (", "invalid_regex"), ("(?=a)a1", "invalid_regex"), ("elephant", "unwritable_schema")):
            body = asked(None, response_format=None, structured_outputs={"regex": regex})
            reply = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "structured_outputs.regex"
            assert reply.json()["error"]["code"] == code


def test_letters_match_a_regular_expression(letters):
    regex = r"(red|blue)/[0-9]{2,4}"
    hot = {"temperature": 1.5, "seed": 1, "n": 4}
    body = asked(None, response_format=None, structured_outputs={"regex": regex}, **hot)
    found = choices(letters, body)
    assert all(re.fullmatch(regex, choice["message"]["content"]) for choice in found)
    assert len({choice["message"]["content"] for choice in found}) > 1
