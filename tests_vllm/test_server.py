"""The OpenAI-compatible server: many clients at once, each answered as if it were alone."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ALLOWED, LENGTH, Model, Request, words
from fresh import ENVIRONMENT
from openai import AsyncOpenAI

SETTINGS = [
    *("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "32", "--max-num-batched-tokens", "256"),
    *("--block-size", "32", "--enforce-eager", "--logprobs-mode", "processed_logprobs", "--seed", "0"),
    *("--served-model-name", "tiny", "--host", "127.0.0.1"),
]
COMMANDS = {
    "vllm serve": [str(Path(sys.executable).parent / "vllm"), "serve"],
    "api_server": [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"],
}


@contextlib.contextmanager
def server(command: str, model: str, log: Path) -> Iterator[str]:
    """A server on a free port, up and healthy; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*COMMANDS[command], model, *SETTINGS, "--port", str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-6000:])
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{address}/health", timeout=2)
                break
            time.sleep(1)
        yield f"{address}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def content(request: Request, model: Model) -> list[dict]:
    """The request as parts of a chat message, images as data URLs."""
    parts: list[dict] = []
    images = iter(request["images"])
    for i, text in enumerate(request["text"].split(model.place)):
        if i:
            data = base64.b64encode(Path(next(images)).read_bytes()).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return parts


async def ask(client: AsyncOpenAI, request: Request, model: Model) -> tuple[list[int], list[float]]:
    reply = await client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content(request, model)}],  # type: ignore[list-item]
        max_tokens=LENGTH,
        temperature=0,
        logprobs=True,
        extra_body={"allowed_token_ids": ALLOWED, "ignore_eos": True, "return_token_ids": True},
    )
    choice = reply.choices[0]
    return choice.token_ids, [step.logprob for step in choice.logprobs.content]  # type: ignore


def clients(model: Model) -> list[Request]:
    """32 requests, no two alike: none, one or two images of many sizes, some behind a common beginning."""
    requests = []
    for i in range(32):
        one = model.image(f"c{i}", 16 + 8 * (i % 4), 16 + 8 * (i % 5))
        two = model.image(f"d{i}", 24, 16)
        requests.append(
            [
                model.request(f"@ {words(i, 6)}", one),
                model.request(f"{words(50, 70)} @ {words(i, 5)}", one),  # the same text before another image
                model.request(f"@ {words(i, 3)} @ {words(i + 1, 9)}", one, two),
                model.request(words(i, 40)),
            ][i % 4]
        )
    return requests


def test_32_clients_at_once_each_as_if_alone(qwen3, tmp_path):
    requests = clients(qwen3)

    async def talk(address: str) -> tuple[list, list]:
        async with AsyncOpenAI(base_url=address, api_key="none", timeout=300, max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, request, qwen3) for request in requests))
            alone = [await ask(client, request, qwen3) for request in requests]
        return together, alone

    with server("vllm serve", qwen3.served, tmp_path / "log") as address:
        together, alone = asyncio.run(talk(address))
    for request, (tokens, logprobs), (tokens_alone, logprobs_alone) in zip(requests, together, alone, strict=True):
        assert tokens == tokens_alone
        assert logprobs == pytest.approx(logprobs_alone, abs=1e-4)
        expected = qwen3.answer(request)
        assert tokens == expected["tokens"]
        assert logprobs == pytest.approx(expected["logprobs"], abs=1e-4)


def test_the_server_module(qwen3, tmp_path):
    request = qwen3.nine()[5]

    async def talk(address: str) -> tuple[list[int], list[float]]:
        async with AsyncOpenAI(base_url=address, api_key="none", timeout=300, max_retries=0) as client:
            return await ask(client, request, qwen3)

    with server("api_server", qwen3.served, tmp_path / "log") as address:
        tokens, _ = asyncio.run(talk(address))
    assert tokens == qwen3.answer(request)["tokens"]
