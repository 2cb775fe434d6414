"""Everything that is too much, broken or not allowed gets a 4xx that says so, and costs nobody else anything."""

import base64
import json
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from live import NAME, as_bytes, as_url, ask, images, serving, wait_for
from PIL import Image

from keepsight.serve.openai.settings import Limits

LIMITS = Limits(
    max_batch=2,
    max_queue=1,
    max_output_tokens=1500,
    max_prompt_tokens=400,
    max_images=2,
    max_image_bytes=20_000,
    max_image_pixels=10_000,
    max_body_bytes=60_000,
    read_seconds=0.5,
)


@pytest.fixture(scope="module")
def strict(remembering):
    with serving(*remembering, limits=LIMITS) as live:
        yield live


def bomb(width, height):
    """A PNG of some bytes that claims any size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def text(words):
    return [{"role": "user", "content": words}]


def refusal(live, **body):
    """(status, code) of a request, and a check that the error has OpenAI's form."""
    body = {"model": NAME, "messages": ask(images(1)[0]), "max_tokens": 2} | body
    response = httpx.post(
        f"{live.url}/v1/chat/completions",
        content=json.dumps(body),  # escapes what is no valid text
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    if response.status_code == 200:
        return 200, None
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return response.status_code, error["code"]


def damaged():
    whole = as_bytes(images(1)[0])
    return whole[: len(whole) // 2]


def noise(side):
    import random

    return as_bytes(Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side)))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 200, None),
        ({"messages": ask(data_url(bomb(200, 100)))}, 413, "image_too_large"),
        ({"messages": ask(data_url(bomb(60_000, 60_000)))}, 413, "image_too_large"),
        ({"messages": ask(data_url(bomb(2**31 - 1, 2**31 - 1)))}, 413, "image_too_large"),
        ({"messages": ask(data_url(noise(90)))}, 413, "image_too_large"),
        ({"messages": ask(data_url(damaged()))}, 400, "invalid_image"),
        ({"messages": ask(data_url(b"GIF89a"))}, 400, "invalid_image"),
        ({"messages": ask(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))}, 400, "invalid_image"),
        ({"messages": ask(data_url(b""))}, 400, "invalid_image"),
        ({"messages": ask("file-0123")}, 404, "file_not_found"),
        ({"messages": ask(as_url(images(1)[0])) * 3}, 400, "too_many_images"),
        ({"messages": text("read " * 500)}, 400, "context_length_exceeded"),
        ({"messages": text("x" * 20_000)}, 400, "context_length_exceeded"),
        ({"messages": text("x" * 70_000)}, 413, "request_too_large"),
        ({"messages": text("<|image_pad|>")}, 400, "reserved_token"),
        ({"messages": text([{"type": "input_audio", "input_audio": {}}])}, 400, "invalid_value"),
        ({"messages": [{"role": "system", "content": ask(images(1)[0])[0]["content"]}]}, 400, "invalid_value"),
        ({"messages": [*text("read"), {"role": "assistant", "content": "a1"}]}, 400, "invalid_value"),
        ({"messages": text(None)}, 400, "invalid_value"),
        ({"messages": text("\ud800")}, 400, "invalid_json"),
        ({"messages": text("read \U0001f680")}, 200, None),
        ({"\ud800": 1}, 400, "invalid_json"),
        ({"messages": text("\u0000 read \u202e")}, 200, None),
        ({"messages": text("")}, 200, None),
        ({"max_tokens": 1501}, 400, "invalid_value"),
        ({"max_tokens": 0}, 400, "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "invalid_value"),
        ({"n": 3}, 400, "invalid_value"),
        ({"temperature": -1}, 400, "invalid_value"),
        ({"temperature": "hot"}, 400, "invalid_value"),
        ({"top_p": 0}, 400, "invalid_value"),
        ({"top_logprobs": 3}, 400, "invalid_value"),
        ({"stream_options": {"include_usage": True}}, 400, "invalid_value"),
        ({"stop": ["a", ""]}, 400, "invalid_value"),
        ({"seed": 2**70}, 400, "invalid_value"),
        ({"logit_bias": {"99999": 1}}, 400, "invalid_value"),
        ({"tools": [{"type": "function"}]}, 400, "invalid_value"),
        ({"response_format": {"type": "json_object"}}, 400, "unwritable_schema"),
        ({"response_format": {"type": "text"}, "store": False, "user": "me", "stop": None}, 200, None),
        ({"best_of": 2}, 400, "unknown_parameter"),
        ({"keepsight": {"memory": "no way"}}, 400, "invalid_value"),
        ({"keepsight": {"magic": 1}}, 400, "unknown_parameter"),
        ({"model": "gpt-4o"}, 404, "model_not_found"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_what_is_refused(strict, body, status, code):
    assert refusal(strict, **body) == (status, code)
    strict.wait_until_idle()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a":NaN}', b"[" * 50_000, b"\xff\xfe", b'"x"'])
def test_what_is_no_request(strict, content):
    url = f"{strict.url}/v1/chat/completions"
    response = httpx.post(url, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert httpx.post(url, content=content).status_code == 415
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{strict.url}/nothing").json()["error"]["type"] == "not_found_error"


def test_a_body_without_a_length_is_bounded_too(strict):
    def endless():
        for _ in range(200):
            yield b"x" * 1000

    response = httpx.post(
        f"{strict.url}/v1/chat/completions", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


def test_a_body_that_never_ends_is_given_up(strict):
    with socket.create_connection(("127.0.0.1", strict.port)) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        slow.sendall(b"Content-Length: 1000\r\n\r\n{")
        slow.settimeout(10)
        assert b" 408 " in slow.recv(1000)
    strict.wait_until_idle()


def test_uploads_are_checked(strict):
    client = strict.client()
    assert client.files.create(file=("a.png", as_bytes(images(1)[0])), purpose="vision").bytes > 0
    for content, purpose, status in (
        (b"no image", "vision", 400),
        (bomb(60_000, 60_000), "vision", 413),
        (bytes(30_000), "vision", 413),
        (bytes(90_000), "vision", 413),
        (as_bytes(images(1)[0]), "batch", 400),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.files.create(file=("a.png", content), purpose=purpose)
        assert error.value.status_code == status
    assert httpx.post(f"{strict.url}/v1/files", content=b"x").status_code == 400


def test_too_many_at_once_get_429_and_the_others_their_answers(strict):
    client = strict.client()

    def one(seed):
        try:
            return client.chat.completions.create(
                model=NAME, messages=ask(images(1)[0]), max_tokens=60, logit_bias={"3": -100}
            )
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(one, range(12)))
    full = [answer for answer in answers if isinstance(answer, Exception)]
    assert full
    assert all(error.response.headers["Retry-After"] for error in full)
    served = [answer.choices[0].message.content for answer in answers if answer not in full]
    assert len(served) >= 3
    assert len(set(served)) == 1
    strict.wait_until_idle()


def long_stream(client, **more):
    return client.chat.completions.create(
        model=NAME, messages=ask(images(1)[0]), max_tokens=1500, stream=True, logit_bias={"3": -100}, **more
    )


def test_a_client_that_leaves_frees_its_slot_and_memory(strict):
    client = strict.client()
    engine = strict.api.engine
    streams = [long_stream(client) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    assert engine.running == 2
    with pytest.raises(openai.APITimeoutError):  # waits in the queue, and leaves it
        client.with_options(timeout=0.3).chat.completions.create(
            model=NAME, messages=ask(images(1)[0]), max_tokens=1500, logit_bias={"3": -100}
        )
    wait_for(lambda: not engine._waiting)
    streams[0].close()
    wait_for(lambda: engine.running == 1)
    streams[1].close()
    strict.wait_until_idle()
    with pytest.raises(openai.APITimeoutError):  # leaves while it is answered, without a stream
        client.with_options(timeout=0.5).chat.completions.create(
            model=NAME, messages=ask(images(1)[0]), max_tokens=1500, logit_bias={"3": -100}
        )
    strict.wait_until_idle()
    assert engine._batches == []
    assert refusal(strict) == (200, None)


def test_a_client_that_never_reads_does_not_hold_its_place(strict):
    body = json.dumps(
        {"model": NAME, "messages": ask(images(1)[0]), "stream": True, "max_tokens": 40, "logit_bias": {"3": -100}}
    ).encode()
    with socket.create_connection(("127.0.0.1", strict.port)) as silent:
        silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        silent.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: strict.api.engine.running == 1)
        assert refusal(strict) == (200, None)
        strict.wait_until_idle()


def test_an_error_in_one_request_touches_no_other_and_logs_nothing_of_it(strict, monkeypatch, caplog):
    """The model itself fails on one request, with a message that quotes it."""
    secret = "zebra"
    expected = strict.client().chat.completions.create(model=NAME, messages=ask(images(1)[0]), max_tokens=50)
    encode = strict.api.served.processor.__class__.__call__
    stream = long_stream(strict.client())
    first = next(iter(stream))

    def fails(self, *args, **kwargs):
        if any(secret in words for words in kwargs.get("text", ())):
            raise RuntimeError(f"cannot read {kwargs['text']}")
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(strict.api.served.processor.__class__, "__call__", fails)
    with caplog.at_level("DEBUG"):
        assert refusal(strict, messages=text(f"a {secret}")) == (500, "internal_error")
        assert refusal(strict, messages=ask(images(1)[0], f"a {secret}")) == (500, "internal_error")
        again = strict.client().chat.completions.create(model=NAME, messages=ask(images(1)[0]), max_tokens=50)
        wait_for(lambda: "/v1/chat/completions 200" in caplog.text)  # written once the client has its answer
    assert again.choices[0].message.content == expected.choices[0].message.content
    assert first.choices
    stream.close()
    logged = [record.getMessage() + str(record.exc_info or "") for record in caplog.records]
    mine = [line for record, line in zip(caplog.records, logged, strict=True) if record.name.startswith("keepsight")]
    assert any("RuntimeError" in line for line in mine)
    server_side = [
        line
        for record, line in zip(caplog.records, logged, strict=True)
        if not record.name.startswith(("openai", "http"))
    ]
    picture = as_url(images(1)[0])[30:60]
    answer = again.choices[0].message.content[:12]
    assert not [line for line in server_side if secret in line or picture in line or answer in line]


def test_keys_and_hosts(remembering):
    with serving(*remembering, api_key="s3cret", trusted_hosts=("localhost", "127.0.0.1")) as live:
        with pytest.raises(openai.AuthenticationError):
            live.client(api_key="wrong").models.list()
        assert live.client(api_key="s3cret").models.list().data[0].id == NAME
        assert httpx.get(f"{live.url}/v1/models").status_code == 401
        assert httpx.get(f"{live.url}/health").json() == {"status": "ok"}
        assert httpx.get(f"{live.url}/metrics").status_code == 200
        rebound = httpx.get(f"{live.url}/health", headers={"Host": "evil.example:80"})
        assert rebound.status_code == 421


def test_health_and_metrics(strict):
    before = httpx.get(f"{strict.url}/metrics").text
    assert refusal(strict) == (200, None)
    strict.wait_until_idle()
    after = httpx.get(f"{strict.url}/metrics").text

    def value(page, name):
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))

    for name in ("keepsight_prompt_tokens_total", "keepsight_completion_tokens_total", "keepsight_images_total"):
        assert value(after, name) > value(before, name)
    ok = 'keepsight_responses_total{path="/v1/chat/completions",status="200"}'
    assert value(after, ok) == value(before, ok) + 1
    assert "process_resident_memory_bytes" in after
    assert httpx.get(f"{strict.url}/health").status_code == httpx.head(f"{strict.url}/health").status_code == 200
