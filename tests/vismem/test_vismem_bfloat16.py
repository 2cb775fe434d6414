"""VisMem in bfloat16, the dtype that models run in: the properties hold within its rounding (`-m bfloat16`)."""

import pytest
import torch
from families import make_inputs
from helpers import in_bfloat16
from vismem_helpers import BY_NAME, ROWS, at_choices, attach, forced, generate, uncached

pytestmark = pytest.mark.bfloat16

LOGITS = 1 / 50
"""Of the largest logit. Measured on a CPU, five families, three seeds: 0.002 to 0.009; latents of zero: > 0.07."""

NAMES = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "internvl_qwen3", "llava_onevision")


@pytest.fixture(params=NAMES)
def half(request):
    """(model with a strong VisMem, all in bfloat16, inputs of several rows, its base)."""
    family = BY_NAME[request.param]
    base = in_bfloat16(family.build())
    model = in_bfloat16(attach(family.build()))
    return model, in_bfloat16(make_inputs(family, model, ROWS)), base


def test_cached_equals_uncached(half):
    model, inputs, _ = half
    out = generate(model, inputs, memory=forced())
    assert [[i.kind for i in row] for row in out.invocations] == [["long"], ["short", "long"], []]
    expected = at_choices(out, uncached(model, inputs, out)).float()
    largest = LOGITS * expected.abs().max()
    assert (at_choices(out, torch.stack(out.logits, 1)).float() - expected).abs().max() < largest
    for row in out.invocations:
        for invocation in row:
            invocation.latents.zero_()
    assert (at_choices(out, uncached(model, inputs, out)).float() - expected).abs().max() > 2 * largest


def test_off_equals_the_base_bit_for_bit(half):
    model, inputs, base = half
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    off, plain = model.generate(**inputs, **options, memory="off"), base.generate(**inputs, **options)
    assert torch.equal(off.sequences, plain.sequences)
    words = plain.logits[0].shape[-1]
    assert all(torch.equal(a[:, :words], b) for a, b in zip(off.logits, plain.logits, strict=True))
