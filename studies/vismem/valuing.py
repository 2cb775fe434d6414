"""An invocation policy that weighs what comes: values of every choice, fitted backwards over the scripts' blocks.

Stage II learns from the reward of whole sequences and spends its budget at once. Here the value of each action at each
decision is a ridge regression on what all outcomes of the train scripts gave: the block's score, and behind it the best
that the regressions of the later blocks expect. What a decision may know is either the clock (tokens so far, tokens
since the last memory, memories spent) or that and the model's own state there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from studies.vismem.invocation import ACTIONS, BLOCKS, BUDGET, Bank, Choose, index_of, play

OUTCOMES = torch.tensor(ACTIONS)
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
"""Of the ridge regressions; chosen on one half of the train scripts, fitted on the other."""


@dataclass(frozen=True)
class Values:
    """Fitted values.

    Attributes:
        weights: per block [F, 3], of the actions.
        mean, scale: [D], of the states; None where only the clock is known.
    """

    weights: list[torch.Tensor]
    mean: torch.Tensor | None
    scale: torch.Tensor | None

    def of(self, bank: Bank, block: int, scripts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Of the three actions [n, 3] at a block, behind the actions of outcomes `index` [n] before it."""
        return self.features(bank, block, scripts, index) @ self.weights[block]

    def features(self, bank: Bank, block: int, scripts: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What a decision may know [n, F]."""
        times, before = bank.times[scripts].double(), OUTCOMES[index, :block] > 0
        last = torch.where(before, times[:, :block], 0.0).amax(-1) if block else torch.zeros(len(scripts))
        now, used = times[:, block] / 1000, before.sum(-1).double()
        since = now - last / 1000
        parts = [torch.ones_like(now), now, now**2, since, since**2, used, used * since]
        known = torch.stack(parts, -1).double()
        if self.mean is None or self.scale is None:
            return known
        states = (bank.states[scripts, index, block].double() - self.mean) / self.scale
        return torch.cat([known, states], -1)


def fit_values(bank: Bank, states: bool, penalty: float) -> Values:
    """Values from all outcomes of a bank's scripts, the last block first."""
    every = bank.states.double().flatten(0, 2)
    mean, scale = (every.mean(0), every.std(0) + 1e-6) if states else (None, None)
    values = Values([torch.zeros(0)] * BLOCKS, mean, scale)
    scripts = torch.arange(len(bank.scores))
    for block in reversed(range(BLOCKS)):
        columns = []
        for action in range(3):
            some = ((OUTCOMES[:, block] == action) & (OUTCOMES[:, block + 1 :] == 0).all(-1)).nonzero().flatten()
            row = scripts.repeat_interleave(len(some))
            index = some.repeat(len(scripts))
            gained = bank.right[row, index, block].double() / BLOCKS
            if block + 1 < BLOCKS:
                later = values.of(bank, block + 1, row, index)
                spent = (OUTCOMES[index] > 0).sum(-1) >= BUDGET
                gained = gained + torch.where(spent, later[:, 0], later.amax(-1))
            known = values.features(bank, block, row, index)
            ridge = penalty * torch.eye(known.shape[1], dtype=known.dtype)
            ridge[0, 0] = 1e-6
            columns.append(torch.linalg.solve(known.T @ known + ridge, known.T @ gained))
        values.weights[block] = torch.stack(columns, -1)
    return values


def by_value(bank: Bank, values: Values) -> Choose:
    """The action of the highest value."""
    return lambda block, scripts, index, used: values.of(bank, block, scripts, index).argmax(-1)


def best_values(bank: Bank, states: bool) -> tuple[Values, float]:
    """Values with the penalty that is best on half of the scripts when fitted on the other half, and that penalty."""
    half = len(bank.scores) // 2
    learn, check = (Bank(b.states[s], b.rest[s], b.right[s], b.times[s]) for b, s in _halves(bank, half))
    scripts = torch.arange(len(check.scores))

    def score(penalty: float) -> float:
        actions = play(check, scripts, by_value(check, fit_values(learn, states, penalty)))
        return float(check.scores[scripts, index_of(actions)].mean())

    penalty = max(PENALTIES, key=score)
    return fit_values(bank, states, penalty), penalty


def _halves(bank: Bank, half: int) -> list[tuple[Bank, slice]]:
    return [(bank, slice(None, half)), (bank, slice(half, None))]
