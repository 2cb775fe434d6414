"""What the tests of the vLLM plugin share: models on disk, prompts, and what the Hugging Face path answers.

They need an environment of their own (`make_env.py`) and are no part of the main suite: `make test-vllm`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import engine
import fresh
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import keepsight
from keepsight.pvm import memory_off
from keepsight.serve.vllm.export import export_vllm

torch.set_num_threads(1)
LENGTH = 12
ALLOWED = list(range(tiny.FIRST_WORD, tiny.VOCAB))  # words only: random models would write placeholders and ends
Request = dict[str, Any]
Answer = dict[str, Any]


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + i * 7) % 100}" for i in range(count))


@dataclass
class Model:
    """A tiny model on disk, exported, and the same on the Hugging Face path.

    Attributes:
        family: row of `tiny.FAMILIES`.
        folder: holds base, memory, lora, out and images.
    """

    family: str
    folder: Path
    dtype: str = "auto"
    _loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def served(self) -> str:
        return str(self.folder / "out")

    @property
    def place(self) -> str:
        return tiny.PLACEHOLDER[self.family]

    def image(self, name: str, height: int, width: int) -> str:
        """An image of noise, as a file."""
        file = self.folder / f"{name}-{height}x{width}.png"
        if not file.exists():
            noise = np.random.default_rng(sum(name.encode())).integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file)
        return str(file)

    def request(self, text: str, *images: str) -> Request:
        """A prompt; each "@" in `text` stands for an image."""
        assert text.count("@") == len(images)
        return {"text": text.replace("@", self.place), "images": list(images)}

    def nine(self) -> list[Request]:
        """The nine kinds of prompt."""
        a, b = self.image("a", 24, 32), self.image("b", 32, 24)
        return [
            self.request(f"@ {words(1, 5)}", self.image("small", 16, 16)),
            self.request(f"@ {words(2, 5)}", self.image("medium", 40, 24)),
            self.request(f"@ {words(3, 5)}", self.image("large", 48, 64)),
            self.request(f"@ @ {words(4, 6)}", a, b),
            self.request(f"@ @ {words(4, 6)}", b, a),
            self.request(f"{words(5, 4)} @ {words(6, 9)} @ {words(7, 4)}", a, b),
            self.request(f"{words(8, 90)} @ {words(9, 5)}", a),
            self.request(words(10, 60)),
            self.request(f"{words(11, 8)} @ {words(12, 70)}", b),
        ]

    def answer(self, request: Request, memory: bool = True, length: int = LENGTH, lora: str | None = None) -> Answer:
        """Greedy, on the Hugging Face path, alone in its batch."""
        key = f"{json.dumps(request)} {memory} {length} {lora}"
        if key not in self._loaded:
            model, processor = self._load(lora)
            images = [Image.open(file) for file in request["images"]] or None
            inputs = processor(text=[request["text"]], images=images, return_tensors="pt")
            if images:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            if memory:
                self._loaded[key] = _generate(model, inputs, length)
            else:
                with memory_off(model):
                    self._loaded[key] = _generate(model, inputs, length)
        return self._loaded[key]

    def _load(self, lora: str | None) -> Any:
        name = f"model {lora}"
        if name not in self._loaded:
            more = [self.folder / lora] if lora else []
            self._loaded[name] = keepsight.load(self.folder / "memory", *more, dtype=self.dtype)
        return self._loaded[name]


def _generate(model: Any, inputs: Any, length: int) -> Answer:
    forbidden = torch.ones(tiny.VOCAB, dtype=torch.bool)
    forbidden[ALLOWED] = False
    out = model.generate(
        **inputs,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=[lambda ids, scores: scores.masked_fill(forbidden, float("-inf"))],
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    logprobs = [step[0].float().masked_fill(forbidden, float("-inf")).log_softmax(-1) for step in out.logits]
    return {
        "prompt": inputs["input_ids"][0].tolist(),
        "tokens": tokens,
        "logprobs": [step[token].item() for step, token in zip(logprobs, tokens, strict=True)],
        "all": torch.stack(logprobs),
    }


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """family -> its tiny model, made once."""
    made: dict[str, Model] = {}

    def make(family: str) -> Model:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny.make_base(family, folder / "base")
            tiny.make_memory(folder / "base", folder / "memory")
            export_vllm(folder / "memory", folder / "out")
            made[family] = Model(family, folder, "bfloat16" if family == "qwen3_5" else "auto")
        return made[family]

    return make


@pytest.fixture(scope="session")
def qwen3(make_model: Callable[[str], Model]) -> Model:
    return make_model("qwen3_vl")


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs one engine in a process of its own; see engine.py."""

    def run(model: str, rounds: list[list[Request]], length: int = LENGTH, **job: Any) -> dict[str, Any]:
        described = {"model": model, "rounds": rounds, "max_tokens": length, "allowed": ALLOWED, "engine": {}} | job
        (tmp_path / "job.json").write_text(json.dumps(described))
        answers = tmp_path / "answers.json"
        log = fresh.run(engine.main, str(tmp_path / "job.json"), str(answers), log=tmp_path / "log")
        return json.loads(answers.read_text()) | {"log": log}

    return run


def assert_equal(model: Model, requests: list[Request], answers: list[Answer], atol: float = 1e-4, **how: Any) -> None:
    """Same prompt tokens, same greedy tokens, same log-probabilities as the Hugging Face path."""
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        length = len(answer["tokens"])
        expected = model.answer(request, length=length, **how)
        assert answer["prompt"] == expected["prompt"], f"prompt {number}"
        assert answer["tokens"] == expected["tokens"], f"prompt {number}"
        assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=atol), f"prompt {number}"
