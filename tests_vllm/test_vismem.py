"""VisMem written by vLLM: tokens, memories and log-probabilities are those of the Hugging Face path."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fresh
import latent as beside
import pytest
import tiny
import torch
from conftest import Model, Request, words
from fresh import ENVIRONMENT
from openai import BadRequestError, OpenAI
from PIL import Image
from test_server import content

import keepsight
from keepsight.serve.hf.batch import Batch
from keepsight.serve.hf.latent import LatentMemories
from keepsight.serve.hf.rows import Job
from keepsight.serve.hf.sampling import Sampling
from keepsight.vismem import MemoryPolicy, VisMemBranch

LENGTH = 30
#: Random models write words and memories only.
BIAS = dict.fromkeys(range(tiny.FIRST_WORD), -100.0)
FORCED = {"name": "forced", "at": {0: "short", 5: "long", 6: "long"}}


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(family, spare rows) -> its tiny model with a VisMem whose invocation tokens the model writes now and then."""

    def make(family: str, spare: int = 0) -> Model:
        folder = tmp_path_factory.mktemp(f"latent_{family}")
        tiny.make_base(family, folder / "base", spare)
        tiny.make_vismem(folder / "base", folder / "memory", bias=0.5)
        return Model(family, folder)

    return make


class Reference:
    """The Hugging Face path."""

    def __init__(self, model: Model):
        self.model, self.processor = keepsight.load(model.folder / "memory", base=model.folder / "base")

    def answer(self, request: Request, policy: MemoryPolicy | None = None, length: int = LENGTH) -> dict[str, Any]:
        """As keepsight serve writes it, alone in its batch."""
        images = [Image.open(file).convert("RGB") for file in request["images"]]
        inputs = dict(self.processor(text=[request["text"]], images=images or None, return_tensors="pt"))
        events: list[Any] = []
        sampling = Sampling(length, 0.0, logit_bias=BIAS, logprobs=0, seed=0)
        memory = request.get("memory", True)
        job = Job(inputs, inputs["input_ids"].shape[1], sampling, 1, memory, events.append)
        batch = Batch(self.model, self.processor.tokenizer, memory)
        if policy is not None and batch.latent is not None:
            batch.latent = LatentMemories.of(self.model, policy)
        batch = batch.read(job)
        (row,) = batch.rows
        if policy is not None:  # copies of a row forget it
            row.latent.plan = dict(policy.plan(0))
        while batch.rows:
            assert not any(gone.error for gone in batch.step())
        return {
            "text": "".join(getattr(event, "text", "") for event in events),
            "tokens": row.ids[job.prompt_tokens :],  # without the last, which is written and not read
            "logprobs": [entry[1] for event in events for entry in getattr(event, "logprobs", ())],
            "invocations": [[i.kind, i.invoked_as, i.was_sampled] for i in row.invocations],
        }

    @torch.no_grad()
    def generated(self, request: Request, memory: Any) -> list[int]:
        """As `model.generate` writes it."""
        images = [Image.open(file).convert("RGB") for file in request["images"]]
        inputs = self.processor(text=[request["text"]], images=images or None, return_tensors="pt")
        ids = self.model.generate(
            **inputs,
            memory=memory,
            max_new_tokens=LENGTH,
            do_sample=False,
            logits_processor=[lambda ids, scores: scores.index_fill(1, torch.tensor(list(BIAS)), -1e9)],
        )
        return ids[0, inputs["input_ids"].shape[1] :].tolist()


def served(model: Model, rounds: list[Any], tmp_path: Path, **engine: Any) -> list[list[dict[str, Any]]]:
    """What vLLM and the former beside it answer; see latent.py."""
    job = {"base": str(model.folder / "base"), "adapter": str(model.folder / "memory"), "rounds": rounds}
    job |= {"max_tokens": LENGTH, "bias": BIAS, "engine": {"max_num_batched_tokens": 48} | engine}
    (tmp_path / "job.json").write_text(json.dumps(job))
    fresh.run(beside.main, str(tmp_path / "job.json"), str(tmp_path / "answers.json"), log=tmp_path / "log")
    return json.loads((tmp_path / "answers.json").read_text())["rounds"]


@contextlib.contextmanager
def keepsight_server(command: list[str], log: Path) -> Iterator[str]:
    """`keepsight serve` on a free port; yields its address once it says that it serves."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-6000:])
            found = re.search(r"serving tiny on (http://[0-9.:]+/v1)", log.read_text())
            if found:
                break
            time.sleep(1)
        yield found[1]  # type: ignore[index]
    finally:
        process.terminate()
        assert process.wait(120) == 0, "SIGTERM is an orderly end"


def test_every_policy_writes_what_the_hugging_face_path_writes(latent, tmp_path):
    """Nine kinds of prompt at once, in chunks of 48, with the prefix cache; the four tokens behind the vocabulary."""
    model = latent("qwen3_vl")
    nine = model.nine()
    mixed = [request | {"memory": bool(i % 2)} for i, request in enumerate(nine)]
    policies: list[Any] = [None, FORCED, {"name": "reversed"}, {"name": "only_short"}]
    policies += [{"name": "random", "probability": 0.5, "places": "anywhere"}, {"name": "free", "max_invocations": 1}]
    rounds = [[policy, nine] for policy in policies] + [[None, nine], [None, mixed]]

    out = served(model, rounds, tmp_path)

    reference = Reference(model)
    for (told, requests), answers in zip(rounds, out, strict=True):
        policy = MemoryPolicy(**told) if told else None
        for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            expected = reference.answer(request, policy)
            where = f"{told}, prompt {number}"
            assert answer["invocations"] == expected["invocations"], where
            assert answer["tokens"][: len(expected["tokens"])] == expected["tokens"], where
            if request.get("memory", True):  # without, the share of the special columns is known in part only
                assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=2e-4), where
            assert answer["requests"] == 1 + len(answer["invocations"]), where
    for request, answer in zip(nine, out[0], strict=True):
        assert answer["tokens"] == reference.generated(request, "free")
    for request, answer in zip(nine, out[1], strict=True):
        if request["images"]:  # without one there is no short-term memory, and generate warns
            assert answer["tokens"] == reference.generated(request, MemoryPolicy(**FORCED))
    free = [invocation for answer in out[0] for invocation in answer["invocations"]]
    assert {kind for kind, _, chosen in free if chosen} == {"short", "long"}
    assert sum(len(answer["invocations"]) for answer in out[4]) > 5

    # the test can fail: what is in the memories matters
    branch = VisMemBranch.of(reference.model)
    with torch.no_grad():
        branch.active.long_slots.add_(1.0)
        branch.active.short_slots.add_(1.0)
    changed = [reference.answer(request, MemoryPolicy(**FORCED))["tokens"] for request in nine]
    assert sum(tokens != answer["tokens"][: len(tokens)] for tokens, answer in zip(changed, out[1], strict=True)) >= 3


def test_tokens_in_the_bases_spare_rows_and_off_is_the_base(latent, tmp_path):
    model = latent("qwen2_5_vl", spare=8)
    nine = model.nine()
    out = served(model, [[None, nine], [None, [request | {"memory": False} for request in nine]]], tmp_path)
    reference = Reference(model)
    assert max(VisMemBranch.of(reference.model).config.token_ids) < tiny.VOCAB + 8
    for request, answer, off in zip(nine, *out, strict=True):
        assert answer["tokens"] == reference.generated(request, "free")
        assert off["tokens"] == reference.generated(request, "off")
        assert not off["invocations"]
    assert sum(len(answer["invocations"]) for answer in out[0]) > 3


def test_the_server(latent, tmp_path):
    """`keepsight serve --engine vllm`: the same API, extension field, streaming and the switch included."""
    model = latent("qwen3_vl")
    requests = [model.request(f"@ {words(i, 6)}", model.image(f"s{i}", 24, 16 + 8 * i)) for i in range(3)]
    command = [str(Path(sys.executable).parent / "keepsight"), "serve", str(model.folder / "memory")]
    command += [
        "--base",
        str(model.folder / "base"),
        "--engine",
        "vllm",
        "--name",
        "tiny",
        "--max-prompt-tokens",
        "512",
    ]
    command += ["--engine-args", '{"enforce_eager": true, "block_size": 32}']
    bias = {str(i): value for i, value in BIAS.items()}
    with keepsight_server(command, tmp_path / "log") as address, OpenAI(base_url=address, api_key="none") as client:

        def ask(request: Request, **more: Any) -> Any:
            return client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": content(request, model)}],  # type: ignore[list-item]
                **({"max_tokens": LENGTH, "temperature": 0, "logit_bias": bias} | more),
            )

        whole = [ask(request) for request in requests]
        off = ask(requests[0], extra_body={"keepsight": {"memory": False}})
        pieces = list(ask(requests[0], stream=True))
        two = ask(requests[1], n=2, temperature=1.0, seed=3, logprobs=True, top_logprobs=2)
        again = ask(requests[1], n=2, temperature=1.0, seed=3, logprobs=True, top_logprobs=2)
        filters = ({"top_k": 1}, {"min_p": 1.0}, {"repetition_penalty": 1.3, "top_k": 1}, {"repetition_penalty": 1.3})
        greedy = [{"temperature": 1.0, "seed": 3}] * 3 + [{}]  # the likeliest token, by every filter
        filtered = [ask(requests[0], **more, extra_body=own) for more, own in zip(greedy, filters, strict=True)]
        with pytest.raises(BadRequestError, match="response_format is not supported"):
            ask(requests[0], response_format={"type": "json_object"})
    reference = Reference(model)
    for request, reply in zip(requests, whole, strict=True):
        asked = request | {"text": " " + request["text"]}
        expected = reference.answer(asked)
        assert reply.choices[0].message.content == expected["text"]
        told = reply.choices[0].keepsight  # type: ignore[attr-defined]
        assert [i["kind"] for i in told["invocations"]] == [kind for kind, _, _ in expected["invocations"]]
        assert reply.usage.completion_tokens == LENGTH
    assert any(reply.choices[0].keepsight["invocations"] for reply in whole)  # type: ignore[attr-defined]
    assert off.choices[0].keepsight == {"memory": False, "memory_tokens": 0, "invocations": []}  # type: ignore
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole[0].choices[0].message.content
    assert [c.message.content for c in two.choices] == [c.message.content for c in again.choices]
    assert two.choices[0].message.content != two.choices[1].message.content
    assert len(two.choices[0].logprobs.content[0].top_logprobs) == 2
    texts = [reply.choices[0].message.content for reply in filtered]
    assert texts[0] == texts[1] == whole[0].choices[0].message.content
    assert texts[2] == texts[3] != texts[0]
    assert "is an experiment" in (tmp_path / "log").read_text()
