"""Stage II over enumerated outcomes: the bank is what reading gives, and learning finds what pays."""

import itertools

import numpy as np
import pytest
import torch
from test_vismem_lab import built

from keepsight.vismem import VisMemBranch
from studies.vismem import invocation as stage
from studies.vismem.invocation import ACTIONS, BLOCKS, BUDGET, Bank, InvocationPlan, Invoker, index_of, play
from studies.vismem.reading import Reading
from studies.vismem.valuing import best_values, by_value


@pytest.fixture(scope="module")
def model():
    return built()


def toy_bank(scripts=40, seed=0):
    """A bank in which a memory pays if it is long and in a late block, which the state tells."""
    generator = torch.Generator().manual_seed(seed)
    shape = (scripts, len(ACTIONS), BLOCKS)
    late = torch.rand(scripts, 1, BLOCKS, generator=generator) > 0.5
    states = torch.randn(*shape, 96, generator=generator) * 0.1
    states[..., 0] += late * 4.0
    longs = torch.tensor(ACTIONS) == 2
    right = 0.5 + 0.5 * (longs[None] & late).float()
    times = torch.arange(1, BLOCKS + 1).expand(scripts, -1) * 100
    return Bank(states, torch.zeros(shape), right, times), late[:, 0]


def test_actions_are_all_that_the_budget_allows():
    everything = set(itertools.product((0, 1, 2), repeat=BLOCKS))
    assert set(ACTIONS) == {a for a in everything if sum(map(bool, a)) <= BUDGET}
    assert ACTIONS[0] == (0,) * BLOCKS
    assert torch.equal(index_of(torch.tensor(ACTIONS)), torch.arange(len(ACTIONS)))


@torch.no_grad()
def test_the_bank_is_what_reading_gives(model):
    vlm, processor = model
    batch = stage.draw_scripts(processor, 2, 21, "test", np.random.default_rng(0))
    bank = stage.enumerate_outcomes(vlm, batch)
    outcome = ACTIONS.index((0, 2, 0, 1, 0))
    reading = Reading(vlm, batch)
    for block, action in enumerate(ACTIONS[outcome]):
        reading.feed(int(batch.answers[3 * block]) + 2)
        torch.testing.assert_close(bank.states[:, outcome, block], reading.last, rtol=0, atol=1e-5)
        if action:
            reading.remember(stage.KINDS[action])
        told = reading.predict(batch.answers[3 * block + 1 : 3 * block + 3]).argmax(-1)
        right = (told == batch.truth()[:, 3 * block + 1 : 3 * block + 3]).float().mean(-1)
        assert torch.equal(bank.right[:, outcome, block], right)
    for other, actions in enumerate(ACTIONS):  # the same beginning, the same state
        if actions[:2] == (0, 2):
            assert torch.equal(bank.states[:, other, 2], bank.states[:, outcome, 2])
    assert torch.equal(bank.times, (batch.lengths[::3] + 2).expand(2, -1))


def test_choices_are_the_models_own_probabilities(model):
    vlm, _ = model
    branch = VisMemBranch.of(vlm)
    state = torch.randn(3, 96)
    logits = branch.backbone.model.get_output_embeddings()(state)
    short, _, long, _ = branch.config.token_ids
    words = logits[:, : branch.backbone.text_config.vocab_size].logsumexp(-1)
    own = Invoker.of(vlm).log_probs(state, words, torch.zeros(3, dtype=torch.long)).exp()
    free = torch.cat([logits[:, :78], logits[:, [short, long]]], -1).softmax(-1)
    torch.testing.assert_close(own[:, 1:], free[:, 78:])
    spent = Invoker.of(vlm).log_probs(state, words, torch.full((3,), BUDGET)).exp()
    assert torch.equal(spent[:, 0], torch.ones(3))


def test_stage_two_finds_what_pays_and_changes_only_the_rows(model):
    vlm, _ = model
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    bank, late = toy_bank()
    log = stage.stage_two(vlm, bank, InvocationPlan(steps=80, lr=3e-2, prompts=16, cost=0.05), seed=0)
    changed = {
        name.rpartition("rows.")[2] for name, new in vlm.state_dict().items() if not torch.equal(new, before[name])
    }
    assert changed == {"invoke_head", "invoke_bias"}
    test, late = toy_bank(seed=1)
    actions = play(test, torch.arange(len(late)), stage.by_model(test, Invoker.of(vlm), None))
    chosen = actions > 0
    assert (actions[chosen] == 2).all()
    assert late[chosen].float().mean() > 0.95
    wanted = late.sum(-1).clamp(max=BUDGET)
    assert (chosen.sum(-1) == wanted).float().mean() > 0.9
    assert log["dS"] > 0.1


def test_fitted_values_find_what_pays_if_they_know_the_state():
    bank, _ = toy_bank(200)
    test, late = toy_bank(seed=1)
    scripts, scores = torch.arange(len(late)), {}
    for states in (False, True):
        values, _ = best_values(bank, states)
        actions = play(test, scripts, by_value(test, values))
        scores[states] = test.scores[scripts, index_of(actions)].mean()
        assert ((actions > 0).sum(-1) <= BUDGET).all()
    torch.testing.assert_close(scores[True], test.scores.max(-1).values.mean(), rtol=0, atol=0.005)
    assert scores[False] < scores[True] - 0.03  # the clock tells nothing there


def test_rivals_are_what_they_are_called():
    bank, _ = toy_bank()
    scripts = torch.arange(len(bank.scores))
    draw = torch.Generator().manual_seed(0)
    assert (play(bank, scripts, stage.at_random(0.0, (1, 2), draw)) == 0).all()
    always = play(bank, scripts, stage.at_random(1.0, (2,), draw))
    assert torch.equal(always, torch.tensor([2] * BUDGET + [0] * (BLOCKS - BUDGET)).expand_as(always))
    clock = play(bank, scripts, stage.by_clock(bank, 150, 1))  # decisions at 100, 200, ...: every second
    assert torch.equal(clock, torch.tensor([0, 1, 0, 1, 0][:BLOCKS]).expand_as(clock))
    schedule = stage.best_schedule(bank)
    fixed = bank.scores[scripts, index_of(play(bank, scripts, stage.by_schedule(schedule)))].mean()
    torch.testing.assert_close(fixed, bank.scores.mean(0).max())
