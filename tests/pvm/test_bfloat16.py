"""PVM in bfloat16, the dtype that models run in: the properties hold within its rounding (`-m bfloat16`).

Distances are shares of the largest value. A broken property moves logits by more than that value itself: the memory's
effect is measured beside each. Mixtures of experts are left to float32, since a rounding may choose another expert.
"""

import copy

import pytest
import torch
from families import FAMILIES, make_inputs
from families.tiny import device
from helpers import MIXED_ROWS, attach, cached_and_uncached, generate, in_bfloat16, logits
from test_equations import block_with_random_weights, equations

pytestmark = pytest.mark.bfloat16

LOGITS = 1 / 16
"""Measured on a CPU over eight families and three seeds: at most 0.031 (LLaVA-OneVision, cached against uncached)."""
BLOCK = 1 / 20
"""Measured on a CPU over six seeds: 0.006 to 0.017."""

DENSE = [family for family in FAMILIES if not family.name.endswith("_moe")]


def apart(found, expected):
    """The largest difference, as a share of the largest expected value."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(params=DENSE, ids=lambda family: family.name)
def half(request):
    """(family, model with an open PVM, all in bfloat16, inputs of several rows)."""
    model = in_bfloat16(attach(request.param.build()))
    return request.param, model, in_bfloat16(make_inputs(request.param, model, MIXED_ROWS))


def test_cached_equals_uncached(half):
    _, model, inputs = half
    out = generate(model, inputs)
    cached, uncached = cached_and_uncached(model, inputs, out)
    assert apart(cached, uncached) < LOGITS
    with model.disable_adapter():
        _, without = cached_and_uncached(model, inputs, out)
    assert apart(without[:2], uncached[:2]) > 8 * LOGITS  # the third row has no image


def test_batch_equals_its_rows(half):
    family, model, inputs = half
    together = logits(model, inputs)
    assert together.dtype == torch.bfloat16
    for i, row in enumerate(MIXED_ROWS):
        alone = logits(model, in_bfloat16(make_inputs(family, model, [row])))[0]
        assert apart(together[i, -len(alone) :], alone) < LOGITS
    assert apart(together[:1, -4:], together[1:2, -4:]) > 8 * LOGITS  # another image, other words


@pytest.mark.parametrize("seed", range(3))
def test_block_equals_the_equations(seed):
    """The equations are computed in float64 from the same rounded weights and inputs."""
    block = block_with_random_weights(seed).bfloat16()
    x, visual = torch.randn(5, 48).bfloat16(), torch.randn(7, 48).bfloat16()
    visible = torch.rand(5, 7) < 0.6
    visible[:, 0] = True
    exact = equations(copy.deepcopy(block).double(), x.double(), visual.double(), visible)
    block, x, visual, visible = (given.to(device) for given in (block, x, visual, visible))
    with torch.no_grad():
        found = block(x[None], *block.project(visual[None]), visible[None, None])[0]
        blind = block(x[None], *block.project(visual[None].roll(1, 1)), visible[None, None])[0]  # wrong images
    assert apart(found, exact) < BLOCK < apart(blind, exact)
