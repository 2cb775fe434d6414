"""The block as six kernels gives the plain block's numbers.

Kernels run on a GPU. Elsewhere Triton interprets them, which it must be told before it reads them: so the tests of
numbers run in a process of their own. What an interpreter takes need not compile: tested for a GPU that is not there.
"""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
from families import BY_NAME
from families.tiny import device
from helpers import MIXED_ROWS, built, counted
from test_bfloat16 import BLOCK, apart
from test_overlap import steps

import keepsight
from keepsight.pvm.fused import MOST_POSITIONS, Fused, fused, may_fuse
from keepsight.pvm.module import BlockShape, PvmBlock
from keepsight.pvm.streams import overlap

triton = pytest.importorskip("triton")
RUNS = torch.device(device).type == "cuda" or triton.knobs.runtime.interpret
numbers = pytest.mark.skipif(not RUNS, reason="run by test_interpreted, or on a GPU")
half = pytest.param(torch.bfloat16, marks=pytest.mark.bfloat16)


def make(dtype, kv_heads=1, bias=False):
    """(block with random weights, the same in float64)."""
    torch.manual_seed(3)
    shape = BlockShape(hidden_size=80, width=48, head_dim=16, num_kv_heads=kv_heads, ffn_width=100, bias=bias)
    block = PvmBlock(shape, init_gate=0.6)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1 and len(parameter) > 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    block = block.to(device, dtype)
    return block, copy.deepcopy(block).double()


@pytest.mark.parametrize("dtype", [torch.float32, half])
@pytest.mark.parametrize(
    ("rows", "length", "tokens", "kv_heads", "masked", "kept"),
    [(1, 1, 7, 1, 0, 0), (2, 1, 130, 3, 1, 1), (1, 3, 1, 3, 1, 3)],
)
@numbers
@torch.no_grad()
def test_six_kernels_are_the_block(dtype, rows, length, tokens, kv_heads, masked, kept):
    """Shapes that are no power of two, shares of one token, rows with masks of their own, silent positions."""
    block, exact = make(dtype, kv_heads, bias=masked == 1)
    x, visual = torch.randn(rows, length, 80).to(device, dtype), torch.randn(rows, tokens, 80).to(device, dtype)
    states, mask, keep = block.project(visual), None, None
    if masked:
        mask = torch.rand(rows, 1, masked, tokens, device=device) < 0.3
        mask[..., -1] = True  # of what lies before, a whole share may be hidden
        mask[0, ..., : tokens // 2] = False
    if kept:
        keep = torch.arange(rows * kept, device=device).view(rows, kept, 1) % 3 != 1
    with fused():
        assert may_fuse(block, x, states)
    update = Fused(block, x, states, mask, keep)
    found = update.added_to(torch.zeros_like(x))
    expected = exact(x.double(), *(state.double() for state in states), mask)
    blind = block(x, *block.project(visual.roll(1, 2)), mask)
    if keep is not None:
        expected = expected.masked_fill(~keep, 0)
        assert not found.masked_select(~keep).any()
    bound = BLOCK if dtype == torch.bfloat16 else 1e-5
    assert apart(found, expected) < bound < apart(blind, expected)
    y = torch.randn_like(x)
    flat = update.added_to(y.flatten(0, 1))  # as some mixtures of experts have it
    # in bfloat16 `found` was rounded before the sum was: by one step of the sum, and half a step of its own below 4
    close = {"rtol": 2**-7, "atol": 2**-6} if dtype == torch.bfloat16 else {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(flat.view_as(y), y + found, **close)


@numbers
def test_a_decoding_step_of_a_model():
    """Several images and none in rows of their own lengths, a static cache; beside the network to the bit."""
    model, inputs = built(BY_NAME["qwen3_vl"], MIXED_ROWS[::2])
    plain = steps(model, inputs, model, contextlib.nullcontext)
    with counted(Fused, "added_to") as times:
        found = steps(model, inputs, model, fused)
    assert times == [4]  # two layers, two steps
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    with fused():
        assert torch.equal(steps(model, inputs, model, overlap), found)
    with model.disable_adapter():
        assert (steps(model, inputs, model, fused) - plain).abs().max() > 1e-2


@numbers
def test_gate_zero_is_the_base_to_the_bit():
    model, inputs = built(BY_NAME["qwen3_vl"], MIXED_ROWS[::2], gate=0.0)
    with counted(Fused, "added_to") as times:
        found = steps(model, inputs, model, fused)
    assert times == [4]
    with model.disable_adapter():
        assert torch.equal(found, steps(model, inputs, model, contextlib.nullcontext))


@numbers
@torch.no_grad()
def test_all_else_takes_the_plain_block():
    block, exact = make(torch.float32)
    x = torch.randn(2, 1, 80, device=device)
    states = block.project(torch.randn(2, 5, 80, device=device))
    assert not may_fuse(block, x, states)  # nobody asked
    with fused():
        assert may_fuse(block, x, states)
        assert not may_fuse(block, x.expand(2, MOST_POSITIONS // 2 + 1, 80), states)
        assert not may_fuse(exact, x, tuple(state.double() for state in states))
        assert not may_fuse(block, x, tuple(state.half() for state in states))
        with torch.enable_grad():
            assert not may_fuse(block, x, states)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            assert not may_fuse(block, x, states)
        handle = block.cross_attn.q_norm.register_forward_hook(lambda *_: None)  # a meter
        assert not may_fuse(block, x, states)
        handle.remove()
        assert may_fuse(block, x, states)


def test_without_triton_there_is_a_word(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(keepsight.errors.KeepsightError, match="Triton"), fused():
        pass


@pytest.mark.skipif(RUNS, reason="on a GPU they were compiled")
def test_the_kernels_compile(monkeypatch):
    """What is started for a masked step, compiled with exactly those arguments; and it is six kernels."""
    from keepsight.pvm import fused_kernels

    compiled = []

    class Started:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.compile

        def compile(self, *args, num_warps=4, **kwargs):
            parameters = self.kernel.params
            given = dict(zip([p.name for p in parameters], args, strict=False)) | kwargs
            known = {p.name: given[p.name] for p in parameters if p.is_constexpr or constant(given[p.name])}
            types = {name: "constexpr" if name in known else typed(value) for name, value in given.items()}
            order = [p.name for p in parameters]
            source = triton.compiler.ASTSource(
                self.kernel,
                {name: types[name] for name in order},
                {(order.index(name),): value for name, value in known.items()},
            )
            target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
            compiled.append(triton.compile(source, target=target, options={"num_warps": num_warps}).metadata.name)

    def constant(value):  # as Triton does when it starts a kernel
        return value is None or (isinstance(value, int) and value == 1)

    def typed(value):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.bool: "i1"}  # of those used here
        return "i32" if isinstance(value, int) else "*" + names[value.dtype]

    for name in ("reduce", "attend", "project", "feed", "expand", "finish"):
        monkeypatch.setattr(fused_kernels, name, Started(getattr(fused_kernels, name)))
    block, _ = make(torch.bfloat16, bias=True)
    x = torch.randn(2, 1, 80).bfloat16()
    with torch.no_grad():
        states = block.project(torch.randn(2, 70, 80).bfloat16())
    mask, keep = torch.ones(2, 1, 1, 70, dtype=torch.bool), torch.ones(2, 1, 1, dtype=torch.bool)
    Fused(block, x, states, mask, keep).added_to(x)
    assert compiled == ["reduce", "attend", "project", "feed", "expand", "finish"]


@pytest.mark.skipif(RUNS, reason="this is that process, or a GPU")
def test_interpreted():
    """All tests of numbers above, in a process whose Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "10 passed, 2 skipped" in done.stdout, done.stdout[-400:]
