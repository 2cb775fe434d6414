"""`keepsight serve` as a process: it says where it listens, and an order to stop lets what runs finish."""

import io
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import transformers
from live import NAME, ask, images, serving, wait_for
from typer.testing import CliRunner

from keepsight.cli import app
from keepsight.cli.common.console import refuse_twins
from keepsight.cli.serve import _adapter_name, _name
from keepsight.errors import KeepsightError
from keepsight.serve.openai.server import _Brief, bind
from keepsight.serve.openai.settings import Limits


@pytest.fixture(autouse=True)
def loud_again():
    """The commands silence libraries; other tests should not inherit that."""
    level = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


def message(*words):
    result = CliRunner().invoke(app, ["serve", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 1, result.output
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def process():
    words = [sys.executable, "-m", "keepsight.cli", "serve", "--port", "0"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(iter(running.stderr.readline, "")), daemon=True)
    reader.start()
    wait_for(lambda: any("serving" in line for line in lines) or running.poll() is not None, 60)
    yield running, lines, reader
    running.kill()
    running.wait()


def test_sigterm_finishes_what_runs(process):
    running, lines, reader = process
    url = re.search(r"http://\S+?/v1", lines[-1])[0]
    assert url.startswith("http://127.0.0.1:")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    options = {
        "model": "keepsight/reference",
        "messages": ask(images(1)[0], "read zebra"),
        "max_tokens": 300,
        "logit_bias": {"3": -100},
    }
    stream = client.chat.completions.create(stream=True, **options)
    chunks = [next(stream)]
    whole = []
    waiter = threading.Thread(target=lambda: whole.append(client.chat.completions.create(**options)))
    waiter.start()
    wait_for(lambda: "running_choices 2.0" in httpx.get(url.replace("/v1", "/metrics")).text)
    running.send_signal(signal.SIGTERM)
    chunks += list(stream)
    waiter.join(60)
    assert chunks[-1].choices[0].finish_reason == "length"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert whole[0].choices[0].message.content == text
    assert len(text.split()) > 200
    assert running.wait(30) == 0
    reader.join(10)
    assert lines[-1] == "[finished]\n"
    assert "zebra" not in "".join(lines)
    assert text[:12] not in "".join(lines)
    assert running.stdout.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)


def test_mistakes_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("keepsight.checkpoints.load.load_several", lambda *a, **k: pytest.fail("it loads"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Choose another" in message("--port", taken.getsockname()[1])
    assert "no such folder" in message("--allow-local-dir", tmp_path / "missing")
    assert "expected a host" in message("--allow-remote-host", "https://a.example/")
    for name in ("https://a.example", "a.example:80", "*.example", ""):
        assert "expected a name" in message("--trusted-host", name)
    assert "no such folder" in message(tmp_path / "missing")
    for given in ("a", "=b", "a=", "a=b+"):
        assert "expected NAME=ADAPTER" in message("--model", given)
    assert "a model 'x' already" in message("--name", "x", "--model", "x=y")
    assert "no such folder" in message("--model", f"a={tmp_path / 'missing'}")
    with pytest.raises(KeepsightError, match="both PVMs"):
        refuse_twins([SimpleNamespace(path=name, method=kind) for name, kind in (("a", "PVM"), ("b", "PVM"))], "Stop.")


def test_an_address_is_taken_once_and_free_again():
    """Also before the first server listens, and as soon as it is gone."""
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(KeepsightError, match="Choose another"):
        bind("127.0.0.1", port)
    taken.close()
    bind("127.0.0.1", port).close()


def test_the_log_holds_no_messages_of_errors():
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(_Brief("%(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    try:
        raise ValueError("zebra")
    except ValueError:
        log.exception("it failed")
        log.error(traceback.format_exc())
    assert lines.getvalue() == "it failed ValueError\nstopped half-way\n"


def test_what_is_not_finished_in_time_is_cut_off_and_told(remembering):
    options = {"model": NAME, "messages": ask(images(1)[0]), "max_tokens": 2048, "logit_bias": {"3": -100}, "n": 8}
    with serving(*remembering, limits=Limits(max_batch=8), patience=1) as live, ThreadPoolExecutor(2) as pool:
        client = live.client()
        stream = client.chat.completions.create(stream=True, **options)
        next(iter(stream))
        waits = pool.submit(client.chat.completions.create, **options)
        wait_for(lambda: live.api._open == 2)
        live.stop()
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="stopped") as error:
            waits.result()
        assert error.value.response.headers["Retry-After"]
    assert live.is_idle()


def test_a_model_is_called_what_its_folder_is_called(tmp_path):
    folder = tmp_path / "my-memory"
    folder.mkdir()
    assert _name(str(folder)) == "my-memory"
    assert _name("owner/name") == "owner/name"
    assert _name("keepsight/reference") == "keepsight/reference" or Path("keepsight/reference").exists()
    assert _adapter_name(folder) == "my-memory"
    assert _adapter_name(Path("cache/models--owner--name/snapshots/0123")) == "owner/name"
