"""GRPO as equations, and VisMem's two objectives: pure functions of tensors, no model and no sampling.

Letters: n trajectories, in groups of G with one prompt, one group after the other; T written positions; V tokens.

    A_i  = (S_i - mean S) / (std S + eps)                          over the group
    L    = mean_i mean_t [ -min(r A_i, clip(r, 1 - c, 1 + c) A_i) + beta (e^d - d - 1) ]
           r = e^(p - old), d = ref - p                            p, old, ref: log-probabilities of a token
    dS   = S(trajectory) - S(the same beginning, without memory)
    I    : dS                                                      stage I, formation
    II   : dS - alpha (p_type + p_neg) - cost * invocations        stage II, invocation; cost is keepsight's own

Source: VisMem (arXiv 2511.11007), the section on two-stage training; the loss is GRPO's as first published (a mean over
each trajectory's tokens, then over trajectories).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

EPS = 1e-4


def group_advantages(scores: torch.Tensor, group: int, eps: float = EPS) -> torch.Tensor:
    """A_i = (S_i - mean S) / (std S + eps) inside every group.

    What all of a group share cancels: subtracting one baseline per prompt changes nothing.

    Args:
        scores: [n].
        group: G; divides n, at least 2.
        eps: keeps groups of equal scores at 0.

    Returns:
        [n].
    """
    grouped = _grouped(scores, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + eps)).flatten()


def token_log_probs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    banned: Sequence[int] = (),
    switched: Sequence[int] = (),
    admitted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probabilities of tokens under the distribution they were drawn from: what could not be drawn has no share.

    Args:
        logits: [n, T, V], already divided by the temperature.
        ids: [n, T].
        banned: ids that are never drawn.
        switched: ids that are drawn only where `admitted` says so.
        admitted: bool [n, T, len(switched)].

    Returns:
        [n, T], in float32 or wider; -inf where `ids` holds a token that could not be drawn.
    """
    wide = (logits if logits.dtype == torch.float64 else logits.float()).clone()
    if banned:
        wide.index_fill_(-1, torch.tensor(sorted(set(banned)), device=wide.device), -torch.inf)
    for column, token in enumerate(switched):
        assert admitted is not None
        wide[..., token] = wide[..., token].masked_fill(~admitted[..., column].to(wide.device), -torch.inf)
    return wide.gather(-1, ids[..., None]).squeeze(-1) - wide.logsumexp(-1)


def clipped_loss(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> torch.Tensor:
    """-min(r A, clip(r, 1 - clip, 1 + clip) A) per token, with r = exp(log_probs - old).

    Args:
        log_probs: [n, T], of the policy that is trained.
        old: [n, T], of the policy that wrote the tokens; no gradient flows into it.
        advantages: [n].
        clip: c.

    Returns:
        [n, T].
    """
    ratio, advantage = (log_probs - old.detach()).exp(), advantages[:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def kl_to(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) for tokens drawn from the policy: e^d - d - 1, d = ref - p (k3).

    Never negative, and without bias. Shapes as given.
    """
    difference = reference.detach() - log_probs
    return difference.exp() - difference - 1


def trajectory_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the positions of `mask` [n, T], per trajectory: [n]; 0 for a trajectory without any."""
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum(1) / mask.sum(1).clamp(min=1)


def group_means(scores: torch.Tensor, group: int) -> torch.Tensor:
    """The mean of each trajectory's group [n], of scores [n] in groups of `group`."""
    return _grouped(scores, group).mean(1, keepdim=True).expand(-1, group).flatten()


def penalty(scores: torch.Tensor, against: torch.Tensor, invoked: torch.Tensor) -> torch.Tensor:
    """max(0, what a trajectory is held against - S(trajectory)) [n], for those that invoked a memory.

    p_type holds the same beginning with the other type of memory against it: the wrong type was chosen. p_neg holds the
    mean of its group against it: an invocation that did not pay. (The paper's equation leaves open whether p_neg falls
    on those that invoked nothing; here it does not.)

    Args:
        scores: [n].
        against: [n].
        invoked: bool [n].
    """
    return torch.where(invoked, (against - scores).clamp(min=0), torch.zeros_like(scores))


def memory_gain(scores: torch.Tensor, without: torch.Tensor) -> torch.Tensor:
    """dS = S(trajectory) - S(the same beginning, without memory) [n]."""
    return scores - without


def invocation_objective(
    gain: torch.Tensor,
    p_type: torch.Tensor,
    p_neg: torch.Tensor,
    invocations: torch.Tensor,
    alpha: float,
    cost: float = 0.0,
) -> torch.Tensor:
    """Stage II: dS - alpha (p_type + p_neg) - cost * invocations, all [n].

    `cost` is keepsight's own; with the paper's 0, a memory that never harms is best invoked always.
    """
    return gain - alpha * (p_type + p_neg) - cost * invocations.to(gain.dtype)


def kl_coefficient(beta: float, kl: float, target: float | None) -> float:
    """The coefficient of the next step: beta, and more in proportion where KL per token was above its target.

    The paper names a target and no rule; this one never goes below its beta.
    """
    return beta if target is None else beta * max(1.0, kl / target)


def _grouped(scores: torch.Tensor, group: int) -> torch.Tensor:
    if group < 2 or len(scores) % group:
        raise ValueError(f"{len(scores)} scores in groups of {group}: expected whole groups of at least 2.")
    return scores.view(-1, group)
