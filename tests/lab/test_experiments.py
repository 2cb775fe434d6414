"""Training: equal parameters, equal data, and a base that stays as it was."""

import numpy as np
import pytest
import torch

from keepsight.lab.experiments import METHODS, TrainPlan, at_length, attach, train, training_batch
from keepsight.lab.reference import build_processor, load_reference
from studies.pvm.refinement import RefinePlan, refine

SMALL = TrainPlan(warmup_steps=2, steps=2, batch=2)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_equal_and_only_the_adapter_trains(method):
    model, processor = load_reference()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(model, processor, method, SMALL, seed=0)
    assert abs(trained.parameters / 127_042 - 1) < 0.001
    assert trained.seconds > 0
    after = trained.model.get_base_model().state_dict()
    for name, tensor in before.items():
        found = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, tensor), name
    assert len(trained.gates) == (0 if method.startswith("lora") else 2)
    assert all(gate != 0 for gate in trained.gates)


def test_methods_start_where_the_base_is():
    model, processor = load_reference()
    batch = training_batch(processor, SMALL, 3, np.random.default_rng(0))
    with torch.no_grad():
        plain = model(**batch.model_inputs(), use_cache=False).logits
        for method in METHODS:
            fresh = attach(load_reference()[0], method, SMALL, seed=0)
            assert torch.equal(fresh(**batch.model_inputs(), use_cache=False).logits, plain), method


def test_training_repeats():
    runs = [train(*load_reference(), "pvm", SMALL, seed=5) for _ in range(2)]
    for (name, first), (_, second) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("method", ["pvm", "pvm_plain", "mlp"])
def test_only_the_memory_is_blindfolded(method):
    """A share of the steps behind the warm-up for PVM; the controls train as if there were no blindfold."""
    weights, seen = [], []
    for share in (0.0, 0.5):
        plan = TrainPlan(warmup_steps=1, steps=3, batch=2, blindfold_share=share)
        steps = []
        trained = train(*load_reference(), method, plan, seed=0, watch=steps.append)
        weights.append([p for p in trained.model.parameters() if p.requires_grad])
        seen.append([step.blindfolded for step in steps])
        assert [round(gate, 4) for gate in steps[-1].gates] == trained.gates
    blind = method == "pvm"
    assert seen == ([[True, False, False, False], [True, False, True, False]] if blind else [[False] * 4] * 2)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True)) != blind


def test_watching_changes_nothing():
    def look(step):
        model.eval()
        with torch.no_grad():
            model(**batch.model_inputs(), use_cache=False)

    batch = training_batch(build_processor(), SMALL, 3, np.random.default_rng(0))
    runs = []
    for watch in (None, look):
        model, processor = load_reference()
        runs.append(train(model, processor, "pvm", SMALL, seed=0, watch=watch).model)
    for (name, first), (_, second) in zip(*(run.named_parameters() for run in runs), strict=True):
        assert torch.equal(first, second), name


def test_no_narration_is_longer_than_the_training_length():
    plan, processor, rng = TrainPlan(batch=1), build_processor(), np.random.default_rng(0)
    lengths = [int(training_batch(processor, plan, step, rng).lengths[-1]) for step in range(plan.warmup_steps + 200)]
    assert max(lengths) < plan.train_length
    assert max(lengths[: plan.warmup_steps]) < 100
    longest = at_length(plan, 2048, steps=10, batch=1)
    assert longest.warmup_steps == 0
    assert 0.9 * 2048 < longest.train_length <= 2048


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="expected one of pvm"):
        attach(load_reference()[0], "vpm", SMALL, seed=0)


def test_full_fine_tuning_changes_the_decoder_and_nothing_else():
    model, processor = load_reference()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(model, processor, "sft", SMALL, seed=0)
    changed = {name for name, tensor in trained.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert trained.parameters == sum(p.numel() for p in model.model.language_model.parameters())
    assert changed
    assert all(".visual." not in name for name in changed)


def test_hidden_states_that_nothing_has_processed_are_the_embeddings():
    """At layer 0 the paper's control retrieves from the raw embeddings themselves; further up it does not."""
    _, processor = load_reference()
    batch = training_batch(processor, SMALL, 3, np.random.default_rng(0))
    for layer, equal in ((0, True), (2, False)):
        logits = []
        for source in ("embeddings", "hidden"):
            plan = TrainPlan(layers=(layer,), source=source)
            model = attach(load_reference()[0], "pvm", plan, seed=0).eval()
            for name, parameter in model.named_parameters():
                if name.endswith(".gate"):
                    parameter.data.fill_(0.5)
            with torch.no_grad():
                logits.append(model(**batch.model_inputs(), use_cache=False).logits)
        assert torch.equal(*logits) == equal


def test_grpo_trains_decoder_and_memory_and_leaves_vision_alone():
    model, processor = load_reference()
    trained = train(model, processor, "pvm", SMALL, seed=0).model
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    found = refine(trained, processor, SMALL, RefinePlan(steps=2, group=4), seed=0)
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(".visual." not in name for name in changed)
    assert any("visual_memory" in name for name in changed)
    assert any("self_attn" in name for name in changed)
    assert 0.5 < found["reward_last"] <= 1  # the base reads short narrations


def test_grpo_learns_from_reward_alone():
    """A decoder that hardly dares to say what it reads is rewarded into saying it."""
    model, processor = load_reference()
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(0.3)  # a hot distribution: mostly wrong when drawn from
    plan = TrainPlan(warmup_steps=0, batch=4, facts=12, max_gap=0)
    found = refine(model, processor, plan, RefinePlan(steps=30, lr=1e-3), seed=0)
    assert found["reward_first"] < 0.6
    assert found["reward_last"] > found["reward_first"] + 0.1
