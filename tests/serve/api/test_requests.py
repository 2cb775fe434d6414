"""What clients send, field by field: accepted, and with its effect; or refused, by the name that the client used."""

import base64
import io
from types import SimpleNamespace

import httpx
import pytest
from letters import TEMPLATE, with_letters
from live import NAME, ask, generated, images, serving
from PIL import Image

import keepsight
from keepsight.serve.hf.rows import Finished, Job, Piece
from keepsight.serve.openai.answers import ChatAnswer
from keepsight.serve.openai.asked.request import ChatRequest
from keepsight.serve.openai.asked.tools import CallReader, Tool, asks_in_known_form
from keepsight.serve.openai.images.sources import ImageSources
from keepsight.serve.openai.images.uploads import Uploads
from keepsight.serve.openai.prompts import Prompts
from keepsight.serve.openai.settings import Limits

LENGTH = 16
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"a": 1}'}}
CALLING = [
    {"role": "user", "content": "read"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "8"},
]
SCHEMA = "response_format.json_schema.schema"


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


@pytest.fixture(scope="module")
def letters(remembering):
    """The same model, with letters and tools."""
    model, processor = remembering
    with serving(model, with_letters(processor)) as live:
        yield live


def send(live, **body):
    body = {"model": NAME, "messages": ask(images(1)[0]), "max_tokens": LENGTH} | body
    return httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=60)


def text(live, **body):
    response = send(live, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


HOT = {"temperature": 1.3, "seed": 3}
#: What is sent -> what means the same.
SAME = [
    ({}, {"temperature": 0}),
    ({**HOT, "top_k": 1}, {}),
    ({**HOT, "min_p": 1.0}, {}),
    ({**HOT, "top_p": 1e-6}, {}),
    ({**HOT, "top_k": -1}, {**HOT, "top_k": 0}),
    ({**HOT, "min_p": 0}, HOT),
    ({**HOT, "top_p": 1}, HOT),
    ({"repetition_penalty": 1}, {}),
    ({"max_tokens": None, "max_completion_tokens": LENGTH}, {}),
    ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": False}, {}),
    ({"store": False, "user": "me", "stop": None, "reasoning_effort": "none", "service_tier": "auto"}, {}),
    ({**HOT, "logit_bias": {"34": 100}, "top_p": 0.1}, {"logit_bias": {"34": 100}}),  # a bias comes before filters
]
#: What is sent -> what means something else.
DIFFERENT = [
    (HOT, {**HOT, "seed": 4}),
    (HOT, {}),
    ({**HOT, "top_k": 2}, HOT),
    ({**HOT, "min_p": 0.9}, HOT),
    ({"repetition_penalty": 5}, {}),
    ({"frequency_penalty": 2}, {}),
    ({"logit_bias": {"34": -100}}, {}),
    ({"max_tokens": 3}, {}),
    ({"keepsight": {"memory": False}}, {}),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_these_mean_the_same(server, one, other):
    assert text(server, **one) == text(server, **other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=str)
def test_these_make_a_difference(server, one, other):
    assert text(server, **one) != text(server, **other)


def test_a_repetition_penalty_is_that_of_generate(server, remembering):
    picture = images(1)[0]
    assert text(server, repetition_penalty=1.5) == generated(*remembering, picture, LENGTH, repetition_penalty=1.5)


def test_the_shipped_vismem_samples_with_filters():
    """Filters that keep only what memory forbids: once, eight seeds of eight ended in NaN."""
    with serving(*keepsight.load("keepsight/reference-vismem")) as live:
        filters = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
        answers = [send(live, **filters, seed=seed, max_tokens=60).json()["choices"][0] for seed in range(8)]
        assert all(answer["message"]["content"] for answer in answers)
        assert sum(len(answer["keepsight"]["invocations"]) for answer in answers) > 8
        likeliest = text(live, temperature=0, max_tokens=60)
        for sharp in ({"top_k": 1}, {"min_p": 1}, {"top_p": 1e-6}):
            assert text(live, temperature=0.7, seed=1, max_tokens=60, **sharp) == likeliest


def wide():
    """An image that the processor refuses: its sides differ too much."""
    return Image.new("RGB", (2048, 9))


#: Body -> (param, code): the place at fault, as the client wrote it.
REFUSED = [
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"Stream_options": {}}, "Stream_options", "unknown_parameter"),
    ({"Top_logprobs": 2}, "Top_logprobs", "unknown_parameter"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "unknown_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
    ({"max_tokens": None, "max_completion_tokens": 9999}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": 9999}, "max_tokens", "invalid_value"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"top_k": 1.5}, "top_k", "invalid_value"),
    ({"min_p": 1.1}, "min_p", "invalid_value"),
    ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
    ({"seed": "x"}, "seed", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 9}, "n", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
    ({"logit_bias": {"999": 1}}, "logit_bias", "invalid_value"),
    ({"guided_json": {}}, "guided_json", "unsupported_parameter"),
    ({"functions": [{}]}, "functions", "unsupported_parameter"),
    ({"audio": {}}, "audio", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"tools": [TOOL]}, "tools", "unsupported_parameter"),  # the built-in model's template knows none
    ({"tools": [{"type": "function"}]}, "tools.0.function", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "invalid_value"),
    ({"tools": [TOOL | {"type": "retrieval"}]}, "tools.0.type", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls", "invalid_value"),
    ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, f"{SCHEMA}", "invalid_value"),
    (schema({"type": "objekt"}), SCHEMA, "invalid_schema"),
    (schema({"not": {"type": "integer"}}), SCHEMA, "invalid_schema"),
    (schema({"type": "object"}), SCHEMA, "unwritable_schema"),  # the built-in model has no braces
    ({"response_format": {"type": "json_object"}}, "response_format", "unwritable_schema"),
    ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format", "invalid_value"),
    ({"messages": CALLING}, "messages.1.tool_calls", "unsupported_parameter"),
    ({"messages": CALLING[:1] + CALLING[2:]}, "messages.1.tool_call_id", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "8"}]}, "messages.0.tool_call_id", "invalid_value"),
    ({"messages": [{"role": "user", "tool_calls": [CALL]}]}, "messages.0.tool_calls", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "invalid_value"),
    ({"messages": [CALLING[0], {"role": "assistant"}, CALLING[0]]}, "messages.1.content", "invalid_value"),
    ({"messages": [CALLING[0], {"role": "assistant", "content": "a"}]}, "messages.1.role", "invalid_value"),
    ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role", "invalid_value"),
    ({"messages": ask(images(1)[0]) + ask(wide())}, "messages.1.content.0", "invalid_value"),
    ({"messages": [{"role": "system", "content": ask(wide())[0]["content"]}]}, "messages.0.content.0", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "read"}, "messages", "invalid_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_refusal_names_what_the_client_wrote(server, body, param, code):
    response = send(server, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert param.split(".")[0] in error["message"] or param.startswith("messages")


def test_a_misspelt_parameter_is_recognised(server):
    for wrong, right in (("temprature", "temperature"), ("Stream_options", "stream_options"), ("TopP", "top_p")):
        assert f"Did you mean {right}?" in send(server, **{wrong: 1}).json()["error"]["message"]


def test_what_an_engine_cannot_do_is_refused_by_name(letters, monkeypatch):
    """As with vLLM, which would begin a schema anew behind every memory."""
    monkeypatch.setattr(letters.api.engine, "unserved", ("response_format",))
    error = send(letters, **schema({"type": "integer"})).json()["error"]
    assert (error["param"], error["code"]) == ("response_format", "unsupported_parameter")
    assert send(letters, response_format={"type": "text"}).status_code == 200


def test_arguments_of_a_call_are_json(letters):
    call = CALL | {"function": {"name": "look_up", "arguments": "{a}"}}
    error = send(letters, messages=[CALLING[0], CALLING[1] | {"tool_calls": [call]}, CALLING[2]]).json()["error"]
    assert error["param"] == "messages.1.tool_calls.0.function.arguments"


def test_tools_reach_the_prompt(letters):
    def length(**body):
        response = send(letters, **body)
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    assert length(messages=CALLING[:1], tools=[TOOL]) > length(messages=CALLING[:1]) + 50
    assert length(messages=CALLING[:1], tools=[TOOL], tool_choice="none") == length(messages=CALLING[:1])
    assert length(messages=CALLING) > length(messages=CALLING[:1]) + 50
    typed = [TOOL | {"function": {"name": "a", "description": "<|image_pad|>"}}]
    assert send(letters, tools=typed).json()["error"]["code"] == "reserved_token"


def test_a_template_shows_how_its_model_asks(letters, remembering):
    assert asks_in_known_form(letters.api.served.processor)
    assert not asks_in_known_form(remembering[1])
    json_form = "{{ '<tool_call>" + TEMPLATE.partition("{{ '<tool_call>")[2].partition("}}")[0] + "}}"
    tagged = (
        "{{ '<tool_call>\\n<function=' + call['function']['name'] + '>\\n' }}"
        "{%- for name, value in call['function']['arguments'] | items -%}"
        "{{ '<parameter=' + name + '>\\n' + value + '\\n</parameter>\\n' }}"
        "{%- endfor -%}{{ '</function>\\n</tool_call>' }}"
    )
    assert json_form in TEMPLATE
    assert asks_in_known_form(with_letters(remembering[1], TEMPLATE.replace(json_form, tagged)))
    assert not asks_in_known_form(with_letters(remembering[1], TEMPLATE.replace("<tool_call>", "<call>")))


TEXTS = [
    ("a <b> c", "a <b> c", []),
    ("", "", []),
    ('so: \n<tool_call>\n{"name": "f", "arguments": {"x": "</a>"}}\n</tool_call>', "so:", [("f", '{"x": "</a>"}')]),
    (
        '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "f", "arguments": {"y": 2}}</tool_call>',
        "",
        [("f", "{}"), ("f", '{"y": 2}')],
    ),
    (
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        [],
    ),
    (
        "<tool_call>\n<function=f>\n<parameter=n>\n7\n</parameter>\n<parameter=s>\n7\n</parameter>\n"
        "<parameter=l>\n[1, 2]\n</parameter>\n<parameter=x>\na\nb\n</parameter>\n</function>\n</tool_call>",
        "",
        [("f", '{"n": 7, "s": "7", "l": [1, 2], "x": "a\\nb"}')],
    ),
    ("<tool_call><function=g></function></tool_call>", "<tool_call><function=g></function></tool_call>", []),
    ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
    ('a <tool_call>{"name": "f"', 'a <tool_call>{"name": "f"', []),
    ("a <tool", "a <tool", []),
]


@pytest.mark.parametrize(("written", "said", "called"), TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_from_any_pieces(written, said, called, size):
    typed = {"n": {"type": "integer"}, "s": {"type": "string"}, "l": {"type": "array"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": typed}}}
    reader = CallReader([Tool.model_validate(tool)])
    found = "".join(reader.push(written[i : i + size]) for i in range(0, len(written), size))
    rest, calls = reader.finish()
    assert found + rest == said
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == called
    assert len({call["id"] for call in calls}) == len(calls)


class Told:
    """Events as the engine sends them."""

    def __init__(self, *events):
        self.events = list(events)

    async def next(self):
        return self.events.pop(0)


@pytest.mark.parametrize("reads_calls", [True, False])
def test_calls_in_an_answer_and_in_a_stream(reads_calls):
    import asyncio

    written = 'see <tool_call>{"name": "look_up", "arguments": {"a": 1}}</tool_call>'
    asked = ChatRequest.model_validate({"model": NAME, "messages": CALLING[:1], "tools": [TOOL]})
    job = Job({}, 1, None, 1, True, print)
    events = [Piece(0, written[i : i + 4]) for i in range(0, len(written), 4)] + [Finished(0, "stop", 9, 0, [])]

    async def both():
        whole = await ChatAnswer(asked, job, NAME, None, reads_calls).whole(Told(*events))
        first, *others = events
        chunks = [c async for c in ChatAnswer(asked, job, NAME, None, reads_calls).stream(Told(*others), first)]
        return whole["choices"][0], [chunk["choices"][0] for chunk in chunks]

    choice, chunks = asyncio.run(both())
    streamed = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    calls = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    assert streamed == choice["message"]["content"] == ("see" if reads_calls else written)
    assert chunks[-1]["finish_reason"] == choice["finish_reason"] == ("tool_calls" if reads_calls else "stop")
    functions = [call["function"] for call in calls]
    assert functions == [call["function"] for call in choice["message"].get("tool_calls", [])]
    assert functions == ([{"name": "look_up", "arguments": '{"a": 1}'}] if reads_calls else [])
    assert [call["index"] for call in calls] == list(range(len(calls)))


@pytest.mark.parametrize(("size", "seen"), [((1024, 768), (512, 384)), ((300, 600), (256, 512)), ((32, 48), (32, 48))])
@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_low_detail_makes_large_images_smaller_and_no_other(size, seen, detail):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
    request = ChatRequest.model_validate({"model": NAME, "messages": [{"role": "user", "content": [part]}]})
    limits = Limits()
    prompts = SimpleNamespace(limits=limits, sources=ImageSources(limits, Uploads(limits)), takes_videos=False)
    [image] = Prompts.decode(prompts, Prompts.collect(prompts, request))
    assert image.size == (seen if detail == "low" else size)
