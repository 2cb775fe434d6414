"""The block equals the paper's equations, written here once more in plain tensors; sizes equal the published ones."""

import copy
import math

import pytest
import torch
from families import BY_NAME
from helpers import attach
from torch import nn
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

import keepsight
from keepsight.backbone import Backbone
from keepsight.pvm.module import BlockShape, ParallelMlpBlock, PvmBlock

SHAPE = BlockShape(hidden_size=48, width=32, head_dim=8, num_kv_heads=2, ffn_width=40)


def block_with_random_weights(seed=0, gate=0.6):
    torch.manual_seed(seed)
    block = PvmBlock(SHAPE, init_gate=gate).double()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return block


def rms(x, weight=None, eps=1e-6):
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def equations(block, x, visual, visible):
    """The update of one text position and head at a time: x [T, D], visual [M, D], visible [T, M] -> [T, D]."""
    w = {name: p.detach() for name, p in block.named_parameters()}
    out = torch.zeros_like(x)
    v_lat = visual @ w["vision_reducer.weight"].T
    for t in range(len(x)):
        q_in = rms(x[t] @ w["text_reducer.weight"].T, w["input_norm.weight"])
        q = (q_in @ w["cross_attn.q_proj.weight"].T).view(4, 8)
        k = (v_lat @ w["cross_attn.k_proj.weight"].T).view(-1, 2, 8)
        v = (v_lat @ w["cross_attn.v_proj.weight"].T).view(-1, 2, 8)
        heads = []
        for h in range(4):
            query = rms(q[h], w["cross_attn.q_norm.weight"])
            keys = rms(k[:, h // 2], w["cross_attn.k_norm.weight"])  # two query heads share a key/value head
            scores = (keys @ query / math.sqrt(8)).masked_fill(~visible[t], -torch.inf)
            heads.append(torch.softmax(scores, 0) @ v[:, h // 2])
        a = torch.cat(heads) @ w["cross_attn.o_proj.weight"].T
        n = rms(a, w["post_attn_norm.weight"])
        gate, up = n @ w["mlp.gate_proj.weight"].T, n @ w["mlp.up_proj.weight"].T
        hidden = a + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
        out[t] = w["gate"] * rms(hidden @ w["output_expander.weight"].T)
    return out


def test_block_equals_the_equations():
    block = block_with_random_weights()
    x, visual = torch.randn(5, 48).double(), torch.randn(7, 48).double()
    visible = torch.rand(5, 7) < 0.6
    visible[:, 0] = True
    found = block(x[None], *block.project(visual[None]), visible[None, None])[0]
    torch.testing.assert_close(found, equations(block, x, visual, visible), rtol=0, atol=1e-12)


def test_retrieval_does_not_depend_on_the_length_of_the_text():
    """Theorem 4.1: for the same x, the branch gives the same whether 0 or 4,000 positions of text came before."""
    block = block_with_random_weights()
    visual, query = torch.randn(1, 7, 48).double(), torch.randn(1, 1, 48).double()
    states = block.project(visual)
    alone = block(query, *states)
    long = block(torch.cat([torch.randn(1, 4000, 48).double(), query], 1), *states)[:, -1:]
    torch.testing.assert_close(long, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [PvmBlock, ParallelMlpBlock])
def test_autocast_computes_what_half_precision_will(kind):
    """A block with float32 weights under autocast equals its bfloat16 copy bit for bit: training is inference."""
    torch.manual_seed(0)
    block = kind(SHAPE, init_gate=0.3)
    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    half = copy.deepcopy(block).bfloat16()
    x, visual = torch.randn(2, 5, 48).bfloat16(), torch.randn(2, 7, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x, *(block.project(visual) if block.reads_memory else ()))
    expected = half(x, *(half.project(visual) if half.reads_memory else ()))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    found.float().square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for n, p in block.named_parameters() if "vision" not in n
    )


def test_output_has_the_gate_as_its_rms():
    block = block_with_random_weights(gate=0.6)
    out = block(torch.randn(2, 5, 48).double(), *block.project(torch.randn(2, 7, 48).double()))
    torch.testing.assert_close(out.pow(2).mean(-1).sqrt(), torch.full((2, 5), 0.6).double(), rtol=1e-4, atol=0)


def test_nothing_starts_dead():
    """Gate and W_up both at zero would leave every gradient at exactly zero."""
    block = PvmBlock(SHAPE)
    assert block.gate.item() == 0
    assert all(m.weight.abs().sum() > 0 for m in block.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("bias", [False, True])
def test_biases_follow_the_backbone(bias):
    block = PvmBlock(BlockShape(hidden_size=48, width=32, head_dim=8, num_kv_heads=2, ffn_width=40, bias=bias))
    assert {n for n, _ in block.named_parameters() if n.endswith("bias")} == (
        {f"cross_attn.{p}_proj.bias" for p in "qkvo"} if bias else set()
    )


REAL = {
    "8B": ({"hidden_size": 4096, "intermediate_size": 12288}, [8, 16, 24], 27_922_179),
    "4B": ({"hidden_size": 2560, "intermediate_size": 9728}, [5, 11, 17], 22_728_963),
}


@pytest.mark.parametrize("size", REAL)
def test_published_sizes(size):
    """PvmConfig() at the paper's shapes: its layers, and its parameter counts to the last one."""
    shape, layers, parameters = REAL[size]
    config = Qwen3VLConfig(
        text_config=shape
        | {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    )
    with torch.device("meta"):
        model = attach(AutoModelForImageTextToText.from_config(config), layers=None, width=None)
    pvm = model.peft_config["default"]
    assert (pvm.layers, pvm.width, pvm.num_kv_heads) == (layers, 512, 1)
    assert model.get_nb_trainable_parameters()[0] == parameters


def test_parallel_mlp_has_the_published_block_size():
    shape = BlockShape(hidden_size=4096, width=512, head_dim=128, num_kv_heads=1, ffn_width=1536)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in kind(shape).parameters()) for kind in (PvmBlock, ParallelMlpBlock)]
    assert counts[0] == 9_307_393
    assert abs(counts[1] - counts[0]) <= 3 * 512 / 2


def test_every_family_resolves_by_itself(family):
    model = family.build()
    config = keepsight.PvmConfig()
    config.resolve(Backbone.of(model))
    assert config.layers == [1, 2, 3]
    assert config.width == 64
    assert config.width % config.head_dim == 0


def test_qwen35_gets_blocks_on_linear_attention_layers_too():
    backbone = Backbone.of(BY_NAME["qwen3_5"].build())
    assert [backbone.has_softmax_attention(layer) for layer in backbone.layers] == [False, False, False, True]
