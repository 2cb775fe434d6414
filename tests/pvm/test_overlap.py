"""On a second stream, beside the feed-forward network, a memory gives the same numbers to the bit."""

import contextlib

import pytest
import torch
from families import BY_NAME, FIRST_WORD, Row
from families.tiny import device
from functorch.compile import make_boxed_func
from helpers import MIXED_ROWS, OnlyWords, built
from torch._dynamo.backends.common import aot_autograd
from transformers import StaticCache

from keepsight.compat import cache_argument
from keepsight.pvm import streams
from keepsight.pvm.fused import fused
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

    def counted(self, x, works):
        found.append(x.device)
        begin(self, x, works)

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
def steps(model, inputs, step, scope):
    """Logits of two steps [2 B, 1, V] behind the prompt."""
    batch, length = inputs["input_ids"].shape
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 8)
    given = {"use_cache": True, **cache_argument(model, cache)}
    model(**inputs, **given)
    word = torch.full((batch, 1), FIRST_WORD, device=device)
    with scope():
        found = [
            step(input_ids=word + i, position_ids=torch.full_like(word, length + i), **given).logits.clone()
            for i in range(2)
        ]
    return torch.cat(found)


@pytest.mark.parametrize(("name", "branch"), [("qwen3_vl", "memory"), ("qwen3_vl_moe", "mlp")])
def test_a_compiled_step_keeps_the_fork(name, branch):
    """In one graph, the same to the bit; and no compiler may move the fork behind the network: that depends on it."""
    model, inputs = built(BY_NAME[name], MIXED_ROWS, branch=branch)
    graphs = []

    def kept(graph, _):
        graphs.append(list(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    base = model.get_base_model()
    compiled = torch.compile(base, fullgraph=True, backend=aot_autograd(fw_compiler=kept))
    plain = steps(model, inputs, compiled, contextlib.nullcontext)
    assert torch.equal(steps(model, inputs, compiled, overlap), plain)
    assert torch.equal(steps(model, inputs, compiled, contextlib.nullcontext), plain)
    torch.testing.assert_close(steps(model, inputs, base, overlap), plain, rtol=0, atol=1e-5)
    found = []
    for nodes in graphs:
        begun = [node for node in nodes if "keepsight.pvm_begin" in str((node.target, *node.args[:1]))]
        joined = [node for node in nodes if "keepsight.pvm_join" in str(node.target)]
        found.append((len(begun), len(joined)))
        for fork, join in zip(begun, joined, strict=True):
            assert fork in sources(join.args[0])
    assert found == [(0, 0), (2, 2)]  # a scope that was left leaves its graph too


def sources(node):
    """Everything that a node of a graph is computed from."""
    found, waiting = set(), [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def test_a_graph_tree_keeps_the_fork():
    """As `generate` compiles on a GPU by itself: kernels by inductor, captured as they are first run."""
    if torch.device(device).type != "cuda":
        pytest.skip("graphs are captured on a GPU: make test-gpu")
    model, inputs = built(BY_NAME["qwen3_vl"], MIXED_ROWS)
    torch._dynamo.reset()
    beside = steps(
        model, inputs, torch.compile(model.get_base_model(), mode="reduce-overhead", fullgraph=True), overlap
    )
    plain = steps(model, inputs, model.get_base_model(), contextlib.nullcontext)
    torch.testing.assert_close(beside, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernels", [contextlib.nullcontext, fused])
@torch.no_grad()
def test_a_captured_step_keeps_the_fork(forks, kernels):
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
        with torch.cuda.stream(side), kernels(), scope():
            for _ in range(2):
                model(**given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with kernels(), scope(), torch.cuda.graph(graph):
            out = model(**given).logits
        for _ in range(3):
            graph.replay()
            logits.append(out.clone())
    assert forks
    assert all(torch.equal(a, b) for a, b in zip(logits[:3], logits[3:], strict=True))
