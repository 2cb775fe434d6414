"""What the benchmarks of serving share: a small model with both memories, a server process, requests."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

import keepsight
from keepsight.vismem import VisMemBranch, add_memory_tokens


@torch.no_grad()
def make_memories(folder: Path) -> list[str]:
    """Adapters for the reference VLM with random weights, strong enough that a wrong memory changes an answer: a PVM,
    and a VisMem that the model invokes by itself.

    Returns:
        Their folders, as `keepsight serve` takes them.
    """
    torch.manual_seed(0)
    model, _ = keepsight.load("keepsight/reference")
    model = get_peft_model(model, keepsight.PvmConfig(width=32))
    for name, parameter in model.named_parameters():
        if "pvm_blocks" in name:
            if name.endswith(".gate"):
                parameter.fill_(0.3)
            elif parameter.ndim == 2:
                parameter.mul_(2)
    model.save_pretrained(folder / "pvm")
    model, processor = keepsight.load("keepsight/reference")
    config = keepsight.VisMemConfig(num_short=4, num_long=4, query_width=32, max_text_states=8, max_invocations=3)
    model = get_peft_model(model, config)
    for name, parameter in VisMemBranch.of(model).active.named_parameters():
        if name.endswith(".up") or "slots" in name:
            parameter.normal_(std=0.1)
        elif name == "rows.invoke_bias":
            parameter.fill_(11.0)
    add_memory_tokens(processor, model)
    model.save_pretrained(folder / "latent")
    return [str(folder / "pvm"), "--adapter", str(folder / "latent")]


class Server:
    """A server process on loopback.

    Args:
        words: the command.
        ready: a pattern in what it prints to stderr; its first group, if there is one, is the base URL.
        url: the base URL, where it is known beforehand.
        healthy: a path to ask until it answers, where nothing is printed.
    """

    def __init__(self, words: Sequence[str], ready: str | None = None, url: str = "", healthy: str = ""):
        # A file and no pipe: a pipe that nobody empties would stop the server.
        self.log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.process = subprocess.Popen([sys.executable, "-u", "-m", *words], stderr=self.log, stdout=self.log)
        self.url = url
        end = time.monotonic() + 300
        while True:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"The server did not start:\n{self.printed()[-3000:]}")
            if ready is not None and (found := re.search(ready, self.printed())):
                self.url = found[1] if found.groups() else url
                return
            if healthy and answers(url + healthy):
                return
            time.sleep(0.2)

    @classmethod
    def keepsight(cls, words: Sequence[str]) -> Server:
        """`keepsight serve` on a free port."""
        return cls(["keepsight.cli", "serve", *words, "--port", "0"], r"on (http://\S+)/v1;")

    def printed(self) -> str:
        """All that it has printed."""
        self.log.flush()
        return Path(f"/proc/self/fd/{self.log.fileno()}").read_text(errors="replace")

    def resident(self) -> float:
        """Memory it holds, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def open_files(self) -> int:
        """Descriptors it holds."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self) -> int:
        """Threads it runs."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def stop(self, seconds: float = 60) -> int:
        """Ask it to finish.

        Returns:
            Its exit status.
        """
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def answers(url: str) -> bool:
    """Whether a URL gives 200."""
    import httpx

    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def as_url(image: Any) -> str:
    """A PIL image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def messages(*images: Any, text: str = "read") -> list[dict[str, Any]]:
    """One turn: images, then text."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": as_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@torch.no_grad()
def generated_ids(model: Any, processor: Any, image: Any, tokens: int, **options: Any) -> torch.Tensor:
    """What plain `generate` answers: new ids [n]."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": "read"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    return out[0, inputs["input_ids"].shape[1] :]


def generated(model: Any, processor: Any, image: Any, tokens: int, **options: Any) -> str:
    """What plain `generate` answers: text."""
    return processor.decode(generated_ids(model, processor, image, tokens, **options), skip_special_tokens=True)


class Clock(threading.Thread):
    """Calls a function every few seconds, until stopped.

    Args:
        seconds: between two calls.
        call: the function.
    """

    def __init__(self, seconds: float, call: Any):
        super().__init__(daemon=True)
        self._seconds, self._call, self._end = seconds, call, threading.Event()
        self.start()

    def run(self) -> None:
        """The thread."""
        while not self._end.wait(self._seconds):
            self._call()

    def stop(self) -> None:
        """No more calls."""
        self._end.set()
        self.join()
