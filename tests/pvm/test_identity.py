"""An untrained memory changes nothing, bit for bit; a memory that is off, gone or without images changes nothing.

The bases are frozen, as every adapter freezes them: torch adds up a product with a frozen weight in another order where
the input does not lie in one piece (Command A Vision's projector).
"""

import copy
import pickle

import pytest
import torch
from families import BY_NAME, IMAGE, VIDEO, Row, make_inputs
from helpers import CLOSE, LAYERS, MIXED_ROWS, attach, built, logits
from peft import get_peft_model

import keepsight
from keepsight.compat import cache_argument, find_output_cache


def test_gate_zero_equals_base(family):
    model = family.build().requires_grad_(False)
    inputs = make_inputs(family, model, MIXED_ROWS)
    base = logits(model, inputs)
    assert torch.equal(logits(get_peft_model(model, keepsight.PvmConfig()), inputs), base)


@pytest.mark.bfloat16
def test_gate_zero_equals_base_in_bfloat16(family):
    model = family.build().requires_grad_(False).bfloat16()
    inputs = make_inputs(family, model, MIXED_ROWS)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    base = logits(model, inputs)
    for autocast in (True, False):  # PEFT keeps adapters in float32 unless told otherwise
        with_pvm = get_peft_model(copy.deepcopy(model), keepsight.PvmConfig(), autocast_adapter_dtype=autocast)
        assert torch.equal(logits(with_pvm, inputs), base)


def test_off_and_unloaded_equal_base(family):
    model = family.build().requires_grad_(False)
    inputs = make_inputs(family, model, MIXED_ROWS)
    base, names = logits(model, inputs), list(model.state_dict())
    with_pvm = attach(model)
    on = logits(with_pvm, inputs)
    assert not torch.allclose(on, base)
    with with_pvm.disable_adapter():
        assert torch.equal(logits(with_pvm, inputs), base)
    assert torch.equal(logits(with_pvm, inputs), on)
    unloaded = with_pvm.unload()
    assert torch.equal(logits(unloaded, inputs), base)
    assert list(unloaded.state_dict()) == names
    hooks = [f for m in unloaded.modules() for f in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(f.__module__.startswith("keepsight") for f in hooks)


def test_base_names_and_weights_stay(family):
    model = family.build().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_text_only_call_is_untouched(family):
    model = family.build().requires_grad_(False)
    inputs = make_inputs(family, model, [Row(6, seed=1), Row(9, seed=2)])
    base = logits(model, inputs)
    with_pvm = attach(model)
    assert torch.equal(logits(with_pvm, inputs), base)


def test_only_text_after_an_image_is_updated(family):
    """Through the first block alone: image positions and text before any image keep the base's hidden states."""
    model = family.build().requires_grad_(False)
    inputs = make_inputs(family, model, MIXED_ROWS)
    states = lambda m: m(**inputs, output_hidden_states=True).hidden_states[LAYERS[0] + 1]  # noqa: E731
    with torch.no_grad():
        base = states(model)
        moved = (states(attach(model, layers=LAYERS[:1])) != base).any(-1)  # [B, T]
    visual = inputs["input_ids"] == IMAGE
    seen = visual.cumsum(1) > 0
    assert torch.equal(moved, seen & ~visual)


def test_published_rule_also_updates_text_before_the_image(family):
    model = family.build().requires_grad_(False)
    inputs = make_inputs(family, model, MIXED_ROWS)
    states = lambda m: m(**inputs, output_hidden_states=True).hidden_states[LAYERS[0] + 1]  # noqa: E731
    with torch.no_grad():
        base = states(model)
        moved = (states(attach(model, layers=LAYERS[:1], causal=False)) != base).any(-1)
    visual = inputs["input_ids"] == IMAGE
    real = inputs["attention_mask"].bool()
    assert torch.equal(moved & real, visual.any(1, keepdim=True) & ~visual & real)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_copies_and_pickles_keep_their_memory(name):
    model, inputs = built(BY_NAME[name])
    on = logits(model, inputs)
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():  # the copies must not look at the original's blocks
            parameter.zero_()
    assert torch.equal(logits(twin, inputs), on)
    assert torch.equal(logits(pickled, inputs), on)


def test_a_typed_placeholder_is_no_image():
    """A video placeholder in a prompt that brings no video is text like any other, cached and uncached."""
    family = BY_NAME["llava_onevision"]
    model, inputs = built(family, [Row((2, 2), 6, seed=1)])
    inputs["input_ids"][0, -3] = VIDEO
    whole = logits(model, inputs)
    start = {k: v[:, :-3] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()}
    with torch.no_grad():
        cache = find_output_cache(model(**start, use_cache=True))
        rest = model(input_ids=inputs["input_ids"][:, -3:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(rest, whole[:, -3:], **CLOSE)
