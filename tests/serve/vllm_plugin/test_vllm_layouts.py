"""Paged attention over all positions, laid out for a memory, is the block's own attention over what is visual."""

from __future__ import annotations

import pytest
import torch

from keepsight.pvm.module import BlockShape, PvmBlock
from keepsight.serve.vllm.attention import FlagChannel, TwinHeads, choose_layout

SHAPE = BlockShape(hidden_size=24, width=32, head_dim=8, num_kv_heads=2, ffn_width=40)
FLAG, TWIN = FlagChannel(4, 2, 8, 16), TwinHeads(4, 2, 8)
# Text before, between and after images; a visual position alone; a sequence without any image.
MASKS = ["..vvv...vv.v.....", "v................", ".................", "vvvvvvvvvvvvvvvv."]


def weights(query: torch.Tensor, key: torch.Tensor, scale: float = 8**-0.5) -> torch.Tensor:
    """Causal grouped-query softmax over every position, as an engine computes it: [heads, n, n]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


def paged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An engine's attention: [n, heads, size]."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", weights(query, key).to(value.dtype), value)


def served(
    block: PvmBlock, layout: FlagChannel | TwinHeads, x: torch.Tensor, embeds: torch.Tensor, where: torch.Tensor
):
    """The update by the paged route: [n, D]."""
    heads = 2 if isinstance(layout, FlagChannel) else 4
    key = torch.full((len(x), heads, layout.size), float("nan"), dtype=x.dtype)
    value = key.clone()
    layout.empty(key, value)
    if where.any():
        k, v = block.project(embeds[where][None])
        key[where], value[where] = layout.pack(k[0].transpose(0, 1), v[0].transpose(0, 1))
    seen = []

    def attention(query, key, value, mask):
        out, some = layout.unpack(paged(layout.pack_query(query[0].transpose(0, 1)), key, value))
        seen.append(some)
        return out.transpose(0, 1)[None]

    update = block(x[None], key, value, None, attention)[0]
    return update.masked_fill(~seen[0] | where[:, None], 0)


def trained(block: PvmBlock, x: torch.Tensor, embeds: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The same as in training: attention over the visual positions alone, masked to those before the query."""
    if not where.any():
        return torch.zeros_like(x)
    key, value = block.project(embeds[where][None])
    slots, position = where.nonzero().squeeze(-1), torch.arange(len(x))
    visible = slots[None] < position[:, None]
    alive = visible.any(-1, keepdim=True)
    update = block(x[None], key, value, (visible | ~alive)[None, None])[0]
    return update.masked_fill(~alive | where[:, None], 0)


def made(mask: str, bias: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    block = PvmBlock(BlockShape(**(vars(SHAPE) | {"bias": bias})), init_gate=0.7).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.mul_(3)
    x, embeds = torch.randn(2, len(mask), 24).to(dtype)
    return block, x, embeds, torch.tensor([letter == "v" for letter in mask])


@pytest.mark.parametrize("layout", [FLAG, TWIN], ids=["flag", "twin"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_a_layout_is_the_blocks_own_attention(layout, bias, mask) -> None:
    block, x, embeds, where = made(mask, bias)
    expected = trained(block, x, embeds, where)
    torch.testing.assert_close(served(block, layout, x, embeds, where), expected, rtol=0, atol=2e-6)
    first = mask.find("v")
    assert not expected[: first if first >= 0 else None].any()
    if first >= 0:
        assert expected[-1].abs().max() > 0.1


@torch.no_grad()
def test_text_weighs_exactly_nothing() -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(9, 4, 8) * 5, torch.empty(2, 9, 2, 16)
    FLAG.empty(key, value)
    visual = torch.tensor([2, 3])
    key[visual], value[visual] = FLAG.pack(torch.randn(2, 2, 8) * 5, torch.randn(2, 2, 8))
    found = weights(FLAG.pack_query(query), key)[:, 3:]
    text = torch.tensor([0, 1, 4, 5, 6, 7, 8])
    assert not found[..., text].any()
    assert found[..., visual].sum(-1).allclose(torch.ones(4, 6))


@pytest.mark.parametrize("layout", [FLAG, TWIN], ids=["flag", "twin"])
@torch.no_grad()
def test_bfloat16_costs_what_it_costs_in_training(layout) -> None:
    mask = "...vvvvvv" + 40 * "."
    block, x, embeds, where = made(mask, False, torch.bfloat16)
    truth = trained(block.double(), x.double(), embeds.double(), where)
    block.bfloat16()
    here = (served(block, layout, x, embeds, where) - truth).abs().max()
    there = (trained(block, x, embeds, where) - truth).abs().max()
    assert here < 3 * there


def test_the_layout_fits_the_backend() -> None:
    class Backend:
        @staticmethod
        def get_name() -> str:
            return "SOME"

        @staticmethod
        def supports_head_size(size: int) -> bool:
            return size in (64, 128, 256)

    assert choose_layout(4, 1, 128, Backend, 512) == FlagChannel(4, 1, 128, 256)
    assert choose_layout(4, 1, 64, Backend, 512) == FlagChannel(4, 1, 64, 128)
    assert choose_layout(4, 1, 128, Backend, 128) == TwinHeads(4, 1, 128)
    assert choose_layout(2, 1, 256, Backend, 512) == TwinHeads(2, 1, 256)
    with pytest.raises(ValueError, match=r"heads are 96 wide.*\(SOME\).*FLASH_ATTN"):
        choose_layout(4, 1, 96, Backend, 96)
