"""Measures: controls change nothing where there is nothing to control, and tampering needs an open gate."""

import numpy as np
import pytest
import torch

from keepsight.backbone import Backbone
from keepsight.lab import evaluation
from keepsight.lab.experiments import TrainPlan, attach
from keepsight.lab.narration import IMAGE_PAD, TOKEN, make_narrations
from keepsight.lab.reference import load_reference

ROWS = 6


@pytest.fixture(scope="module")
def reference():
    return load_reference()


@pytest.fixture
def batches(reference):
    return evaluation.question_batches(reference[1], 128, ROWS, seed=0, split="validation")


def logits(model, batch, **forward):
    with torch.no_grad():
        return model(**{**batch.model_inputs(), "use_cache": False, **forward}).logits


def test_questions_repeat_and_splits_differ(reference):
    processor = reference[1]
    draws = [evaluation.question_batches(processor, 64, ROWS, 1, split) for split in ("test", "test", "validation")]
    assert torch.equal(draws[0][0].input_ids, draws[1][0].input_ids)
    assert not torch.equal(draws[0][0].digits, draws[2][0].digits)
    small = evaluation.question_batches(processor, 64, ROWS, 1, "test", budget=250)
    assert [len(b.digits) for b in small] == [2, 2, 2]  # never one alone: a memory must be able to hold another's image
    with pytest.raises(ValueError, match="two images"):
        evaluation.question_batches(processor, 64, 1, 1, "test")


def test_score_counts(batches):
    truth = [b.truth()[:, -evaluation.SCORED :] for b in batches]
    assert evaluation.score(truth, batches) == evaluation.Score(1.0, ROWS * evaluation.SCORED)
    wrong = [t.clone() for t in truth]
    wrong[0][0, 0] = TOKEN["read"]
    assert evaluation.score(wrong, batches).accuracy == pytest.approx(1 - 1 / (ROWS * evaluation.SCORED))
    assert evaluation.score(truth, batches, roll=1).accuracy < 0.5


def test_masking_filler_hides_the_filler_and_nothing_else(reference):
    model, processor = reference
    dense = make_narrations(processor, [0] * 6, 2, "test", np.random.default_rng(0))
    masked = logits(model, dense, **evaluation.without_filler(model, dense))
    torch.testing.assert_close(masked, logits(model, dense), rtol=0, atol=1e-4)  # no filler: nothing changes

    batch = make_narrations(processor, [12] * 6, 2, "test", np.random.default_rng(0))
    control = evaluation.without_filler(model, batch)
    assert torch.equal(control["position_ids"], evaluation.positions(model, batch))  # distances are kept
    seen = control["attention_mask"][0, 0] == 0
    size = len(batch.filler)
    near = torch.arange(size)[:, None] - torch.arange(size)[None, :] < evaluation.LOCAL_WINDOW
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    assert torch.equal(seen, causal & (near | ~batch.filler[None, :]))
    assert not torch.allclose(logits(model, batch, **control), logits(model, batch), atol=1e-3)


def test_squeezing_keeps_short_outputs_and_shortens_long_ones(reference):
    model, processor = reference
    short = make_narrations(processor, [0] * 6, 2, "test", np.random.default_rng(0))
    assert torch.equal(evaluation.squeezed(model, short)["position_ids"], evaluation.positions(model, short).float())
    long = make_narrations(processor, [40] * 6, 2, "test", np.random.default_rng(0))
    place = evaluation.squeezed(model, long)["position_ids"][0, 0]
    assert (place[-1] - place[long.start]).item() == pytest.approx(55.0)
    assert (place[long.start :].diff() > 0).all()


def test_a_closed_gate_leaves_nothing_to_tamper_with(reference, batches):
    model, _ = load_reference()
    plain = evaluation.accuracy(model, batches)
    untrained = attach(model, "pvm", TrainPlan(), seed=0)
    battery = evaluation.causal_battery(untrained, batches, seed=0)
    for key in ("on", "gate_off", "noise", "swapped"):
        assert battery[key] == plain
    assert battery["swapped_follows"].accuracy < 0.4


def test_an_open_gate_changes_answers_but_not_when_off(batches):
    model, _ = load_reference()
    plain = evaluation.accuracy(model, batches)
    adapted = attach(model, "pvm", TrainPlan(), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(1.5)
    battery = evaluation.causal_battery(adapted, batches, seed=0)
    assert battery["gate_off"] == plain
    assert battery["on"].accuracy < plain.accuracy


def test_attention_mass_is_a_share_and_leaves_the_model_as_it_was(reference):
    model, processor = reference
    decoder = Backbone.of(model).decoder
    before = decoder.config._attn_implementation
    mass = evaluation.attention_mass(model, processor, 64, rows=4, seed=0)
    assert decoder.config._attn_implementation == before
    assert len(mass["layers"]) == len(decoder.layers)
    assert all(0 < value < 1 for layer in mass["layers"] for value in layer)
    # by hand, at the first generated word
    batch = evaluation.question_batches(processor, 64, 4, 0, "test", budget=192)[0]
    with evaluation.eager_attention(model), torch.no_grad():
        weights = model(**batch.model_inputs(), use_cache=False, output_attentions=True).attentions[0]
    image = batch.input_ids[0] == TOKEN[IMAGE_PAD]
    first = weights[:, :, batch.start - 1, image].sum(-1)
    assert ((first > 0) & (first < 1)).all()
