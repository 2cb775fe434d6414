"""On a second stream, beside the feed-forward network, a memory gives the same numbers to the bit."""

import contextlib

import pytest
import torch
from families import BY_NAME, FIRST_WORD, Row, device
from helpers import MIXED_ROWS, OnlyWords, built
from transformers import StaticCache

from keepsight.compat import cache_argument
from keepsight.pvm import streams
from keepsight.pvm.streams import overlap


def decoded(model, inputs, scope):
    """Logits of four written tokens [4, B, V]."""
    with scope():
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, logits_processor=[OnlyWords()], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits)


@pytest.fixture
def forks(monkeypatch):
    """How often a branch was forked."""
    found, begin = [], streams.Fork.__init__

    def counted(self, x, work):
        found.append(x.device)
        begin(self, x, work)

    monkeypatch.setattr(streams.Fork, "__init__", counted)
    return found


@pytest.mark.parametrize("branch", ["memory", "mlp"])
def test_beside_the_network_is_in_order_to_the_bit(family, branch, forks):
    model, inputs = built(family, MIXED_ROWS, branch=branch)
    plain = decoded(model, inputs, contextlib.nullcontext)
    assert not forks
    assert torch.equal(decoded(model, inputs, overlap), plain)
    assert len(forks) in (
        0,
        6,
    )  # two layers, three steps behind the prompt; none where mixer and mlp stand side by side


def test_it_is_for_decoding_steps_alone(forks):
    model, inputs = built(BY_NAME["qwen3_vl"])
    with overlap():
        with torch.no_grad():
            model(**inputs)  # brings images
        model(input_ids=inputs["input_ids"][2:, -3:])  # with gradients
        assert not forks
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][2:, -3:])
    assert len(forks) == 2


@torch.no_grad()
def test_a_captured_step_keeps_the_fork(forks):
    """A CUDA graph of a decoding step, captured with the fork in it, replays to the logits of the plain order."""
    if torch.device(device).type != "cuda":
        pytest.skip("a graph is captured on a GPU: make test-gpu")
    family = BY_NAME["qwen3_vl"]
    logits = []
    for scope in (contextlib.nullcontext, overlap):
        model, inputs = built(family, [Row(3, (2, 2), 4, seed=1)])
        cache = StaticCache(config=model.config, max_cache_len=inputs["input_ids"].shape[1] + 8)
        model(**inputs, use_cache=True, **cache_argument(model, cache))
        token = torch.full_like(inputs["input_ids"][:, :1], FIRST_WORD)
        places = torch.full((3, 1, 1), inputs["input_ids"].shape[1], device=token.device)
        given = {"input_ids": token, "position_ids": places, "use_cache": True, **cache_argument(model, cache)}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), scope():
            for _ in range(2):
                model(**given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with scope(), torch.cuda.graph(graph):
            out = model(**given).logits
        for _ in range(3):
            graph.replay()
            logits.append(out.clone())
    assert forks
    assert all(torch.equal(a, b) for a, b in zip(logits[:3], logits[3:], strict=True))
