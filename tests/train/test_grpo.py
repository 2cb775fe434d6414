"""The equations of group-relative policy optimisation, against numbers worked out by hand and their own properties."""

from __future__ import annotations

import math

import pytest
import torch

from keepsight.train.vismem import grpo


def test_advantages_by_hand():
    # Group 1: mean 0.5, deviations -0.5, 0.5 (std with n - 1: sqrt(0.5)); group 2: all equal.
    found = grpo.group_advantages(torch.tensor([0.0, 1.0, 3.0, 3.0]), 2, eps=0.0 + 1e-4)
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(found, torch.tensor([-expected, expected, 0.0, 0.0]))


def test_a_baseline_shared_by_the_group_cancels_and_one_of_each_trajectory_does_not():
    scores = torch.rand(12, dtype=torch.float64)
    shared, own = torch.rand(3, dtype=torch.float64).repeat_interleave(4), torch.rand(12, dtype=torch.float64)
    advantages = grpo.group_advantages(scores, 4)
    torch.testing.assert_close(grpo.group_advantages(scores - shared, 4), advantages)
    assert (grpo.group_advantages(grpo.memory_gain(scores, own), 4) - advantages).abs().max() > 0.1
    torch.testing.assert_close(grpo.group_advantages(scores * 7, 4, eps=0), grpo.group_advantages(scores, 4, eps=0))
    # Groups do not see each other, and the order inside one does not matter.
    order = torch.tensor([3, 1, 0, 2])
    torch.testing.assert_close(grpo.group_advantages(scores[:4][order], 4), advantages[:4][order])


@pytest.mark.parametrize("wrong", [(5, 2), (4, 1), (4, 3)])
def test_groups_are_whole(wrong):
    with pytest.raises(ValueError, match="whole groups of at least 2"):
        grpo.group_advantages(torch.zeros(wrong[0]), wrong[1])


def test_what_could_not_be_drawn_has_no_share():
    logits = torch.randn(2, 3, 6, dtype=torch.float64)
    ids = torch.tensor([[0, 4, 5], [1, 0, 4]])
    admitted = torch.tensor([[[True, True], [True, False], [False, True]], [[False, False]] * 3])
    found = grpo.token_log_probs(logits, ids, banned=[2], switched=[4, 5], admitted=admitted)
    for row in range(2):
        for t in range(3):
            free = [0, 1, 3] + [token for i, token in enumerate((4, 5)) if admitted[row, t, i]]
            total = logits[row, t, free].logsumexp(0)
            own = int(ids[row, t])
            expected = logits[row, t, own] - total if own in free else torch.tensor(-math.inf, dtype=torch.float64)
            torch.testing.assert_close(found[row, t], expected)
    plain = grpo.token_log_probs(logits, ids)
    torch.testing.assert_close(plain, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0])


def test_a_banned_tokens_logit_gets_no_gradient_and_no_nan():
    logits = torch.randn(1, 2, 5, requires_grad=True)
    ids = torch.tensor([[0, 2]])  # the second could not be drawn: it was forced, and is masked
    found = grpo.token_log_probs(logits, ids, banned=[2])
    torch.where(torch.tensor([[True, False]]), found, torch.zeros(())).sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, :, 2].any()
    assert not logits.grad[0, 1].any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6)],
)
def test_clipping_by_hand(ratio, advantage, expected):
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = grpo.clipped_loss(log_probs, torch.zeros(1, 1), torch.tensor([advantage]), 0.2)
    assert loss.item() == pytest.approx(expected)
    loss.sum().backward()
    outside = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert (log_probs.grad.item() == 0) == outside  # what gained enough gains no more


def test_on_policy_the_gradient_is_that_of_the_policy_gradient():
    log_probs = torch.randn(3, 4, requires_grad=True)
    advantages = torch.randn(3)
    grpo.clipped_loss(log_probs, log_probs.detach(), advantages, 0.2).sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages[:, None].expand(3, 4))


def test_kl_is_unbiased_and_never_negative():
    p, q = torch.randn(6, dtype=torch.float64).log_softmax(0), torch.randn(6, dtype=torch.float64).log_softmax(0)
    estimates = grpo.kl_to(p, q)
    assert (estimates >= 0).all()
    torch.testing.assert_close((p.exp() * estimates).sum(), (p.exp() * (p - q)).sum())
    assert not grpo.kl_to(p, p).any()
    log_probs = p.clone().requires_grad_(True)
    grpo.kl_to(log_probs, q).sum().backward()
    torch.testing.assert_close(log_probs.grad, 1 - (q - p).exp())


def test_every_trajectory_counts_the_same_however_long():
    values = torch.tensor([[1.0, 3.0, 100.0], [4.0, 0.0, 0.0], [7.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    torch.testing.assert_close(grpo.trajectory_mean(values, mask), torch.tensor([2.0, 4.0, 0.0]))
    spoiled = values.masked_fill(~mask, float("nan"))
    torch.testing.assert_close(grpo.trajectory_mean(spoiled, mask), torch.tensor([2.0, 4.0, 0.0]))


def test_objectives_by_hand():
    scores = torch.tensor([1.0, 0.0, 0.5, 0.5])
    other = torch.tensor([0.5, 1.0, 0.9, 0.5])
    without = torch.tensor([0.2, 0.0, 0.5, 0.0])
    invoked = torch.tensor([True, True, False, True])
    p_type = grpo.penalty(scores, other, invoked)
    torch.testing.assert_close(p_type, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    p_neg = grpo.penalty(scores, grpo.group_means(scores, 2), invoked)  # means .5 and .5
    torch.testing.assert_close(p_neg, torch.tensor([0.0, 0.5, 0.0, 0.0]))
    gain = grpo.memory_gain(scores, without)
    count = torch.tensor([1, 2, 0, 1])
    found = grpo.invocation_objective(gain, p_type, p_neg, count, alpha=0.3, cost=0.1)
    torch.testing.assert_close(found, torch.tensor([0.8 - 0.1, -0.3 * 1.5 - 0.2, 0.0, 0.5 - 0.1]))
    paper = grpo.invocation_objective(gain, p_type, p_neg, count, alpha=0.3)
    torch.testing.assert_close(paper, found + 0.1 * count)


def test_the_kl_coefficient_grows_above_the_target_only():
    assert grpo.kl_coefficient(0.015, 0.0, 0.03) == 0.015
    assert grpo.kl_coefficient(0.015, 0.03, 0.03) == 0.015
    assert grpo.kl_coefficient(0.015, 0.09, 0.03) == pytest.approx(0.045)
    assert grpo.kl_coefficient(0.015, 9.0, None) == 0.015
