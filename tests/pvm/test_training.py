"""Training takes the same path as inference: gradient checkpointing, frozen base, no image, TRL's trainers."""

import copy

import pytest
import torch
from families import BY_NAME, Row, make_inputs
from helpers import MIXED_ROWS, attach, built
from peft import LoraConfig, get_peft_model

import keepsight
from keepsight.compat import cache_argument, enable_checkpointing, find_output_cache


def gradients(model, inputs):
    """Gradients of the trainable parameters under a loss on every text position, and the loss."""
    model.train()
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, loss.detach()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_changes_nothing(family, reentrant):
    model, inputs = built(family)
    plain, loss = gradients(model, inputs)
    enable_checkpointing(model, reentrant)
    if reentrant:  # reentrant checkpointing needs an input that requires gradients; trainers do the same
        model.enable_input_require_grads()
    checkpointed, loss_again = gradients(model, inputs)
    assert torch.equal(loss, loss_again)
    assert plain.keys() == checkpointed.keys()
    bound = {"rtol": 1e-4, "atol": 1e-7} if family.rounds else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(checkpointed, plain, **bound)
    assert any(name.endswith("cross_attn.k_proj.weight") and g.abs().sum() > 0 for name, g in plain.items())


def test_two_forwards_before_a_backward():
    """Each loss is computed with its own image, also when the recomputation comes after another request."""
    family = BY_NAME["qwen3_vl"]
    model, _ = built(family)
    requests = [make_inputs(family, model, [Row((2, 2), 5, seed=s)]) for s in (1, 2)]
    separately = [gradients(model, r)[0] for r in requests]
    enable_checkpointing(model)
    model.zero_grad()
    losses = [model(**r, labels=r["input_ids"], use_cache=False).loss for r in requests]
    (losses[0] + losses[1]).backward()
    together = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, separately[0][name] + separately[1][name], rtol=1e-4, atol=1e-6)


def test_only_the_memory_trains(family):
    model, inputs = built(family)
    found, _ = gradients(model, inputs)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trainable
    assert all(".pvm_blocks." in name for name in trainable)


def test_first_step_moves_the_gate_and_then_everything():
    family = BY_NAME["internvl_qwen2"]
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS)
    model = get_peft_model(model, keepsight.PvmConfig())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    moved = {n: g for n, g in gradients(model, inputs)[0].items() if g.abs().sum() > 0}
    assert moved
    assert all(name.endswith(".gate") for name in moved)
    optimizer.step()
    found, _ = gradients(model, inputs)
    assert all(g.abs().sum() > 0 for g in found.values())


def test_a_batch_without_images_gives_zero_gradients_not_none(family):
    """Data-parallel training would wait forever for a parameter that got no gradient."""
    model, inputs = built(family, [Row(6, seed=1), Row(8, seed=2)])
    found, _ = gradients(model, inputs)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all((g == 0).all() for g in found.values())


def test_gradient_reaches_the_projector_through_the_memory_only_on_request():
    family = BY_NAME["qwen2_5_vl"]
    found = {}
    for detach in (True, False):
        model = family.build()
        inputs = make_inputs(family, model, [Row((2, 2), 5, seed=1)])
        model = attach(model, detach_visual=detach)
        projector = model.get_base_model().model.visual.merger.mlp[2]
        projector.weight.requires_grad_(True)
        gradients(model, inputs)
        found[detach] = projector.weight.grad
    # The decoder's own path to the projector is in both; the memory's path comes on top of it.
    assert found[True].abs().sum() > 0
    assert not torch.allclose(found[True], found[False], rtol=1e-3)


def test_a_late_memory_is_refused():
    """A memory that is switched on after the images were read cannot retrieve them."""
    family = BY_NAME["internvl_qwen2"]
    model, inputs = built(family, [Row((2, 2), 5, seed=1)])
    model.add_adapter("late", keepsight.PvmConfig(layers=[1], width=32))
    with torch.no_grad():
        cache = find_output_cache(model(**inputs, use_cache=True))
        model.set_adapter("late")
        with pytest.raises(keepsight.KeepsightError, match="'late' was switched on after"):
            model(input_ids=torch.tensor([[9]]), **cache_argument(model, cache))


def test_iso_parameter_control_has_as_many_parameters_and_looks_at_no_image():
    family = BY_NAME["qwen3_vl"]
    counts = {}
    for branch in ("memory", "mlp"):
        model = attach(family.build(), branch=branch)
        counts[branch] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert abs(counts["mlp"] - counts["memory"]) <= 2 * 3 * 32 / 2  # half a SwiGLU row per block

    inputs = make_inputs(family, model, MIXED_ROWS)
    with torch.no_grad():
        base_model = family.build()
        states = lambda m: m(**inputs, output_hidden_states=True).hidden_states[2]  # noqa: E731
        one = attach(copy.deepcopy(base_model), branch="mlp", layers=[1])
        update = (states(one) - states(base_model)).abs().amax(-1)
    visual = inputs["input_ids"] == 120
    assert (update[visual] == 0).all()
    words = ~visual & inputs["attention_mask"].bool()
    assert (update[words] > 0).all()  # text-only rows too: there is no memory to be without


def test_lora_and_pvm_gradients_both_flow_in_either_order():
    family = BY_NAME["qwen3_vl"]
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)")
    for first in ("lora", "pvm"):
        model = family.build()
        inputs = make_inputs(family, model, MIXED_ROWS)
        if first == "lora":
            get_peft_model(model, lora)
            both = attach(model, adapter_name="memory")
        else:
            attach(model, adapter_name="memory")
            both = get_peft_model(model, copy.deepcopy(lora))
        found, _ = gradients(both, inputs)
        assert any("lora_B" in n and g.abs().sum() > 0 for n, g in found.items())
        assert any("pvm_blocks" in n and g.abs().sum() > 0 for n, g in found.items())
