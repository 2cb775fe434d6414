"""A server on loopback, in this process, and images that it answers differently."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn

from keepsight.lab.samples import example_images
from keepsight.serve.hf.served import Served
from keepsight.serve.openai.api import Api
from keepsight.serve.openai.settings import Limits, ServeSettings

NAME = "tiny"


class Live:
    """A running server.

    Attributes:
        api: its inside.
        url: its address.
    """

    def __init__(self, api: Api, port: int, server: uvicorn.Server):
        self.api, self.port, self.url, self._server = api, port, f"http://127.0.0.1:{port}", server

    def stop(self) -> None:
        """As SIGTERM does."""
        self._server.should_exit = True

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | more))

    def is_idle(self) -> bool:
        engine = self.api.engine
        return not (engine._batches or engine._waiting or self.api._open)

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        wait_for(self.is_idle, seconds)


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@contextmanager
def serving(
    model: Any, processor: Any, limits: Limits | None = None, patience: int = 30, others: Any = None, **settings: Any
) -> Iterator[Live]:
    """A server with these settings; stopped in good order at the end, with `patience` seconds for what runs."""
    api = Api(
        Served.of(model, processor), ServeSettings(name=NAME, limits=limits or Limits(), **settings), others=others
    )
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    config = uvicorn.Config(api.app(), log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=patience)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield Live(api, taken.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(30)
        taken.close()
        assert not thread.is_alive()
        assert not api.engine._thread.is_alive()


def images(count: int) -> list[Any]:
    return [image for image, _ in example_images(count, seed=5)]


def as_bytes(image: Any, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def as_url(image: Any) -> str:
    return "data:image/png;base64," + base64.b64encode(as_bytes(image)).decode()


def ask(image: Any, text: str = "read") -> list[dict[str, Any]]:
    """Messages with one image: a PIL image, or a URL."""
    url = image if isinstance(image, str) else as_url(image)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def generated(model: Any, processor: Any, image: Any, max_new_tokens: int, text: str = "read", **more: Any) -> str:
    """What `generate` answers."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **more)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
