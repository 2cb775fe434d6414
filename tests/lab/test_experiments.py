"""Training: equal parameters, equal data, and a base that stays as it was."""

import numpy as np
import pytest
import torch

from keepsight.lab.experiments import METHODS, TrainPlan, at_length, attach, train, training_batch
from keepsight.lab.reference import build_processor, load_reference

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
