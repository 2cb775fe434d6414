"""`keepsight serve` under good, bad, huge, slow and leaving clients, all at once, for as long as you like.

    python benchmarks/soak.py --minutes 10
    python benchmarks/soak.py --minutes 0.4          # what the tests run

A server process with both memories (random weights, strong enough that a wrong memory changes an answer) on loopback.
Every good answer is compared with the one that plain `generate` gave beforehand for that image, with memory or without.
The run fails, with exit status 1, if

- an answer is wrong: another image's, another's memory setting, or cut off;
- a bad request gets anything but the error it deserves, or a good one gets an error (429 is tried again);
- something hangs: no answer after --patience seconds, a request still open or an answer still being written at the end;
- memory leaks: after the first half, the server's resident memory grows by more than --growth MB (medians of the third
  and fourth quarter);
- descriptors or threads pile up, the server logs an error, or it does not end in good order.

The result goes to benchmarks/results/serve/NAME.json.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import re
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from shared.measuring import conditions, spread
from shared.serving import Clock, Server, generated, make_memories, messages

import keepsight
from keepsight.lab.samples import example_images
from keepsight.pvm import memory_off

RESULTS = Path(__file__).parent / "results" / "serve"
MEASURED = (
    "src/keepsight/serve",
    "src/keepsight/pvm",
    "src/keepsight/vismem",
    ":!src/keepsight/serve/vllm*",
    "benchmarks/soak.py",
    "benchmarks/shared/serving.py",
)
NAME = "soak"
IMAGES, TOKENS = 24, 24
FLAGS = [
    *("--name", NAME, "--max-batch", "6", "--max-queue", "3", "--max-output-tokens", "1500", "--max-images", "3"),
    *("--max-prompt-tokens", "600", "--max-body-mb", "2", "--max-image-mb", "0.5", "--max-image-megapixels", "1"),
]


class Soak:
    """The clients, and what they saw.

    Args:
        url: the server's.
        images: the pictures.
        expected: (image, memory) -> the right answer.
        patience: seconds after which something hangs.
    """

    def __init__(self, url: str, images: list[Any], expected: dict[tuple[int, bool], str], patience: float):
        self.url, self.expected, self.patience = url, expected, patience
        self.bodies = [messages(image) for image in images]
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.counts: Counter[str] = Counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.faults: list[str] = []
        self.clients: list[httpx.Client] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    # What clients do

    def good(self, rng: random.Random) -> None:
        """A question, whole or streamed, with memory or without."""
        index, memory = rng.randrange(len(self.bodies)), rng.random() < 0.5
        body = self._body(index, memory)
        if rng.random() < 0.5:
            answer = self._post(body).json()
            text, reason = answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
            assert answer["choices"][0]["keepsight"]["memory"] is memory
        else:
            text, reason = self._stream(body | {"stream": True})
        self._check(index, memory, text)
        assert reason in ("stop", "length"), reason

    def several(self, rng: random.Random) -> None:
        """Two answers at once, both the same because nothing is drawn."""
        index = rng.randrange(len(self.bodies))
        answer = self._post(self._body(index, True) | {"n": 2}).json()
        for choice in answer["choices"]:
            self._check(index, True, choice["message"]["content"])

    def bad(self, rng: random.Random) -> None:
        """Something that cannot be answered."""
        url = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
        faults: list[tuple[dict[str, Any], int]] = [
            ({"temperature": 9}, 400),
            ({"messages": []}, 400),
            ({"tools": [{}]}, 400),
            ({"nonsense": 1}, 400),
            ({"model": "other"}, 404),
            ({"max_tokens": 10**6}, 400),
            ({"messages": [{"role": "user", "content": [url]}]}, 400),
            ({"messages": self._with_image(os.urandom(300))}, 400),
            ({"messages": [{"role": "user", "content": "read " * 900}]}, 400),
            ({"messages": self.bodies[0] * 4}, 400),
        ]
        fault, status = rng.choice(faults)
        response = self._send(json.dumps(self._body(0, True) | fault).encode())
        assert response.status_code == status, (list(fault), response.status_code)
        assert response.json()["error"]["message"]

    def huge(self, rng: random.Random) -> None:
        """Too much: a body, a file, or an image that is small as long as nobody decodes it."""
        head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        pieces = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]
        bomb = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in pieces
        )
        content = rng.choice(
            [
                self._with_image(bomb),
                self._with_image(os.urandom(700_000)),
                [{"role": "user", "content": "x" * 3_000_000}],
            ]
        )
        response = self._send(json.dumps(self._body(0, True) | {"messages": content}).encode())
        assert response.status_code == 413, response.status_code

    def slow(self, rng: random.Random) -> None:
        """Sends in drops and reads in drops, and gets the right answer all the same."""
        index, memory = rng.randrange(len(self.bodies)), rng.random() < 0.5
        content = json.dumps(self._body(index, memory) | {"stream": True}).encode()
        while True:
            with socket.create_connection(self.address, timeout=self.patience) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                connection.sendall(self._head(len(content)))
                for start in range(0, len(content), len(content) // 5 + 1):
                    connection.sendall(content[start : start + len(content) // 5 + 1])
                    time.sleep(rng.random() * 0.2)
                received = b""
                while piece := connection.recv(512):
                    received += piece
                    time.sleep(0.005)
            head, _, rest = received.partition(b"\r\n\r\n")
            if b" 429 " not in head:
                break
            self._wait(rng)
        assert b" 200 " in head, head[:60]
        lines = re.findall(rb"data: (\{.*\})", rest)
        chunks = [json.loads(line) for line in lines]
        self._check(index, memory, "".join(c["delta"].get("content") or "" for k in chunks for c in k["choices"]))

    def leaving(self, rng: random.Random) -> None:
        """Leaves: in the middle of the body, while waiting, while reading a long stream."""
        body = self._body(rng.randrange(len(self.bodies)), rng.random() < 0.5)
        body |= {"max_tokens": 1500, "logit_bias": {"3": -100}, "stream": rng.random() < 0.7}
        content = json.dumps(body).encode()
        with socket.create_connection(self.address, timeout=self.patience) as connection:
            if rng.random() < 0.3:
                connection.sendall(self._head(len(content)) + content[: len(content) // 2])
            else:
                connection.sendall(self._head(len(content)) + content)
                connection.settimeout(0.2 + 3 * rng.random())  # and that is all the time it has
                with contextlib.suppress(TimeoutError):
                    if rng.random() < 0.7:
                        connection.recv(rng.choice([1, 1000, 4000]))
                time.sleep(rng.random() * 0.5)
            if rng.random() < 0.5:  # a reset instead of a goodbye
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def upload(self, rng: random.Random) -> None:
        """Uploads an image, asks about it, takes it away."""
        index = rng.randrange(len(self.bodies))
        url = self.bodies[index][0]["content"][0]["image_url"]["url"]
        content = base64.b64decode(url.partition(",")[2])
        while True:
            made = self._client().post(
                f"{self.url}/v1/files", files={"file": ("a.png", content)}, data={"purpose": "vision"}
            )
            if made.status_code != 429:
                break
            self._wait(rng)
        name = made.json()["id"]
        parts = [{"type": "image_url", "image_url": {"url": name}}, {"type": "text", "text": "read"}]
        answer = self._post(self._body(index, True) | {"messages": [{"role": "user", "content": parts}]}).json()
        self._check(index, True, answer["choices"][0]["message"]["content"])
        assert self._client().delete(f"{self.url}/v1/files/{name}").status_code == 200

    # Machinery

    def work(self, seed: int, end: float) -> None:
        """One client after the other, of random kinds."""
        rng = random.Random(seed)
        kinds: dict[Callable[[random.Random], None], float] = {
            self.good: 8,
            self.several: 1,
            self.bad: 3,
            self.huge: 1,
            self.slow: 2,
            self.leaving: 3,
            self.upload: 1,
        }
        while time.monotonic() < end:
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            started = time.monotonic()
            try:
                kind(rng)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                with self._lock:
                    self.faults.append(f"{kind.__name__}: {type(error).__name__}: {error} (line {where.lineno})"[:400])
            with self._lock:
                self.counts[kind.__name__] += 1
                self.seconds[kind.__name__].append(time.monotonic() - started)

    def _body(self, index: int, memory: bool) -> dict[str, Any]:
        return {
            "model": NAME,
            "messages": self.bodies[index],
            "max_tokens": TOKENS,
            "temperature": 0,
            "keepsight": {"memory": memory},
        }

    @staticmethod
    def _with_image(content: bytes) -> list[dict[str, Any]]:
        url = "data:image/png;base64," + base64.b64encode(content).decode()
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]

    def _check(self, index: int, memory: bool, text: str) -> None:
        right = self.expected[index, memory]
        if text != right:
            other = [key for key, value in self.expected.items() if value == text]
            raise AssertionError(
                f"wrong answer to {index, memory}: that of {other}" if other else f"{text!r} {right!r}"
            )

    def _client(self) -> httpx.Client:
        if not hasattr(self._local, "client"):
            self._local.client = httpx.Client(timeout=self.patience)
            with self._lock:
                self.clients.append(self._local.client)
        return self._local.client

    def _send(self, content: bytes) -> httpx.Response:
        rng = random.Random()
        while True:
            response = self._client().post(
                f"{self.url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
            )
            if response.status_code != 429:
                return response
            self._wait(rng)

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        response = self._send(json.dumps(body).encode())
        assert response.status_code == 200, (response.status_code, response.text[:200])
        return response

    def _stream(self, body: dict[str, Any]) -> tuple[str, str | None]:
        rng = random.Random()
        while True:
            with self._client().stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status_code == 429:
                    self._wait(rng)
                    continue
                assert response.status_code == 200, response.status_code
                text, reason = "", None
                lines = [line for line in response.iter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            for line in lines[:-1]:
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
            return text, reason

    def _wait(self, rng: random.Random) -> None:
        with self._lock:
            self.counts["429, tried again"] += 1
        time.sleep(0.1 + rng.random() * 0.4)

    def _head(self, length: int) -> bytes:
        return (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {length}\r\n\r\n"
        ).encode()


def gauge(url: str, name: str) -> float:
    """A metric's value."""
    page = httpx.get(f"{url}/metrics", timeout=60).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"keepsight_{name}"))


def right_answers(words: list[str], images: list[Any]) -> dict[tuple[int, bool], str]:
    """What `generate` says to every image, with memory and without."""
    model, processor = keepsight.load(words[0], words[2])
    expected = {}
    for index, image in enumerate(images):
        expected[index, True] = generated(model, processor, image, TOKENS)
        with memory_off(model):
            expected[index, False] = generated(model, processor, image, TOKENS, memory="off")
    assert len(set(expected.values())) == 2 * len(images), "the images must be told apart by their answers"
    return expected


def soak(minutes: float, workers: int, patience: float, growth: float) -> dict[str, Any]:
    """Run; see the module."""
    images = [image for image, _ in example_images(IMAGES, seed=7)]
    with tempfile.TemporaryDirectory() as folder:
        words = make_memories(Path(folder))
        expected = right_answers(words, images)
        server = Server.keepsight([*words, *FLAGS])
        try:
            run = Soak(server.url, images, expected, patience)
            for index in range(len(images)):  # the first requests fill caches that stay
                run._check(index, True, run._post(run._body(index, True)).json()["choices"][0]["message"]["content"])
            idle = {"files": server.open_files(), "threads": server.threads()}
            started = time.monotonic()
            resident = [(0.0, server.resident())]
            clock = Clock(
                max(0.5, minutes * 60 / 120),
                lambda: resident.append((round(time.monotonic() - started, 1), round(server.resident(), 1))),
            )
            end = started + minutes * 60
            threads = [threading.Thread(target=run.work, args=(seed, end), daemon=True) for seed in range(workers)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()) + 2 * patience)
            clock.stop()
            if any(thread.is_alive() for thread in threads):
                run.faults.append("hang: a client never got its answer")
            quiet = time.monotonic() + 20
            names = ("running_choices", "waiting_requests", "open_requests")
            left = {name: gauge(server.url, name) for name in names}
            while any(left.values()) and time.monotonic() < quiet:
                time.sleep(0.2)
                left = {name: gauge(server.url, name) for name in names}
            if any(left.values()):
                run.faults.append(f"hang: {left} after everybody had left")
            for client in run.clients:
                client.close()
            calm = time.monotonic() + 30  # the server closes what idles by itself
            while server.open_files() > idle["files"] and time.monotonic() < calm:
                time.sleep(0.2)
            after = {"files": server.open_files(), "threads": server.threads()}
            run._local = threading.local()  # a new client
            index = 3
            run._check(index, True, run._post(run._body(index, True)).json()["choices"][0]["message"]["content"])
            status = server.stop()
        finally:
            if server.process.poll() is None:
                server.process.kill()
        if status != 0:
            run.faults.append(f"the server ended with status {status}")
        errors = [line for line in server.printed().splitlines() if "ERROR" in line or "Traceback" in line]
        run.faults += [f"the server logged: {line}" for line in errors[:5]]
    size = (len(resident) + 3) // 4
    quarters = [statistics.median(mb for _, mb in resident[q * size : (q + 1) * size]) for q in range(4)]
    grown = quarters[3] - quarters[2]
    if grown > growth:
        run.faults.append(f"leak: {grown:.1f} MB more in the last quarter than in the third")
    if after["files"] > idle["files"] or after["threads"] > idle["threads"] + 16:
        run.faults.append(f"descriptors or threads pile up: {idle} -> {after}")
    return {
        "verdict": "failed" if run.faults else "passed",
        "faults": run.faults[:50],
        "requests": dict(run.counts),
        "seconds": {kind: spread(values) for kind, values in run.seconds.items()},
        "resident_mb_by_quarter": quarters,
        "grown_mb": grown,
        "resident_mb": resident,
        "before_and_after": {"idle": idle, "after": after},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=12, help="clients at a time")
    parser.add_argument("--patience", type=float, default=60, help="seconds after which something hangs")
    parser.add_argument("--growth", type=float, default=16, help="MB that may come on top in the last quarter")
    parser.add_argument("--name", default="soak")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    given = sys.argv[1:] if argv is None else argv
    found = conditions("benchmarks/soak.py", given, MEASURED, torch.device("cpu"), arguments.note)
    result = soak(arguments.minutes, arguments.workers, arguments.patience, arguments.growth)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{arguments.name}.json"
    file.write_text(json.dumps({"conditions": found, "server": FLAGS, "result": result}, indent=1) + "\n")
    shown = {name: value for name, value in result.items() if name not in ("resident_mb", "seconds")}
    print(json.dumps(shown, indent=1))
    return 0 if result["verdict"] == "passed" else 1


if __name__ == "__main__":
    raise SystemExit(main())
