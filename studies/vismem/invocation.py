"""Stage II in the lab: when to invoke, learned from every possible outcome.

Scripts are narrations of a few blocks: filler, a first fact, then two facts that are scored. Behind the first fact's
full stop the model may invoke a short memory, a long one, or none; a sequence has a budget. All outcomes of each script
are enumerated once (a `Bank`: real latents, really spliced), so S without memory and S with the other type are exact
prefix replays, and learning takes seconds. Trained are the invocation tokens' head rows and biases, 194 numbers; the
tokens' input rows stay as they are, so that the bank stays exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from keepsight.lab.digits import Split
from keepsight.lab.narration import Narrations, make_narrations
from keepsight.train.vismem.grpo import (
    clipped_loss,
    group_advantages,
    group_means,
    invocation_objective,
    kl_to,
    memory_gain,
    penalty,
    trajectory_mean,
)
from keepsight.vismem import VisMemBranch
from keepsight.vismem.tokens import LONG, SHORT
from studies.vismem.reading import Reading

BLOCKS, BUDGET, SCORED_FACTS = 5, 2, 2
KINDS = {1: SHORT, 2: LONG}
"""Action -> type; 0 is no invocation."""
ACTIONS = tuple(a for a in itertools.product((0, 1, 2), repeat=BLOCKS) if sum(map(bool, a)) <= BUDGET)
"""All outcomes of a script: one action per decision. The first is never to invoke."""


@dataclass(frozen=True)
class Bank:
    """All outcomes of n scripts; A = len(ACTIONS), R decisions.

    Attributes:
        states: [n, A, R, D], the model's state where it decides.
        rest: [n, A, R], log of the sum of exp of all words' logits there.
        right: [n, A, R], share of the block's scored facts that were told right.
        times: [n, R], generated tokens before each decision, memories not counted.
    """

    states: torch.Tensor
    rest: torch.Tensor
    right: torch.Tensor
    times: torch.Tensor

    @property
    def scores(self) -> torch.Tensor:
        """S of every outcome [n, A]."""
        return self.right.mean(-1)

    @staticmethod
    def cat(banks: list[Bank]) -> Bank:
        """The scripts of several banks."""
        return Bank(*(torch.cat([getattr(b, f.name) for b in banks]) for f in fields(Bank)))

    def save(self, file: Path) -> None:
        """As safetensors."""
        save_file({f.name: getattr(self, f.name).contiguous() for f in fields(Bank)}, str(file))

    @staticmethod
    def load(file: Path) -> Bank:
        """What `save` wrote."""
        return Bank(**load_file(str(file)))


def draw_scripts(processor: Any, rows: int, max_gap: int, split: Split, rng: np.random.Generator) -> Narrations:
    """Scripts of one layout: BLOCKS blocks of filler (20 to `max_gap` words), a first fact and the scored ones."""
    gaps: list[int] = []
    for _ in range(BLOCKS):
        gaps += [int(rng.integers(20, max_gap + 1)), *rng.integers(0, 4, SCORED_FACTS).tolist()]
    return make_narrations(processor, gaps, rows, split, rng)


@torch.no_grad()
def enumerate_outcomes(model: Any, batch: Narrations) -> Bank:
    """Read every outcome of some scripts; beginnings that outcomes share are read once."""
    reading = Reading(model, batch)
    size = reading.last.shape[-1]
    shape = (len(batch.images), len(ACTIONS), BLOCKS)
    states, rest, right = torch.zeros(*shape, size), torch.zeros(shape), torch.zeros(shape)
    per_block = 1 + SCORED_FACTS

    def go_on(block: int, actions: tuple[int, ...]) -> None:
        if block == BLOCKS:
            return
        first = block * per_block
        reading.feed(int(batch.answers[first]) + 2)
        state = reading.last
        words = reading.logits(state).logsumexp(-1)
        mark = reading.mark()
        for action in (0, *KINDS):
            taken = (*actions, action)
            if sum(map(bool, taken)) > BUDGET:
                continue
            reading.rewind(mark)
            if action:
                reading.remember(KINDS[action])
            answers = batch.answers[first + 1 : first + per_block]
            told = reading.predict(answers).argmax(-1) == batch.truth()[:, first + 1 : first + per_block]
            for index, outcome in enumerate(ACTIONS):
                if outcome[: block + 1] == taken:
                    states[:, index, block], rest[:, index, block] = state, words
                    right[:, index, block] = told.float().mean(-1)
            go_on(block + 1, taken)

    go_on(0, ())
    times = batch.lengths[::per_block] + 2
    return Bank(states, rest, right, times.expand(len(batch.images), -1).clone())


def make_bank(
    model: Any,
    processor: Any,
    layouts: int,
    rows: int,
    max_gap: int,
    split: Split,
    rng: np.random.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Bank:
    """A bank of `layouts` times `rows` scripts."""
    banks = []
    for done in range(layouts):
        banks.append(enumerate_outcomes(model, draw_scripts(processor, rows, max_gap, split, rng)))
        progress(done + 1, layouts)
    return Bank.cat(banks)


class Invoker:
    """The model's own choice at its decisions: words, short, long.

    Args:
        heads: the invocation tokens' head rows [2, D].
        biases: [2].
    """

    def __init__(self, heads: torch.Tensor, biases: torch.Tensor):
        self.heads, self.biases = heads, biases

    @staticmethod
    def of(model: Any) -> Invoker:
        """Of a model's active VisMem, whose rows are untied."""
        rows = VisMemBranch.of(model).active.rows
        assert rows.invoke_head is not None, "the bank is exact for untied rows only: VisMemConfig(untied_rows=True)"
        return Invoker(rows.invoke_head, rows.invoke_bias)

    def log_probs(self, states: torch.Tensor, rest: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """Of the three actions [n, 3], at states [n, D], words' log mass `rest` [n] and invocations `used` [n]."""
        own = states @ self.heads.T + self.biases
        logits = torch.cat([rest[:, None], own.masked_fill((used >= BUDGET)[:, None], -1e9)], -1)
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class InvocationPlan:
    """How stage II is trained.

    Attributes:
        steps, lr: of Adam, over `prompts` scripts and groups of G = `group` a step.
        alpha: weight of p_type + p_neg.
        cost: per invocation (ours; the paper's is 0).
        beta: KL coefficient, to the policy that stage II starts from.
        start: log-odds of an invocation of either type against words at the start, on average: untouched rows have a
            probability of about 0, and what is never tried is never learned.
    """

    steps: int = 600
    lr: float = 3e-3
    prompts: int = 64
    group: int = 16
    alpha: float = 0.3
    cost: float = 0.0
    beta: float = 0.015
    clip: float = 0.2
    start: float = -2.0


def index_of(actions: torch.Tensor) -> torch.Tensor:
    """Index in `ACTIONS` of rows of actions [n, R]."""
    table = torch.full((3**BLOCKS,), -1, dtype=torch.long)
    powers = 3 ** torch.arange(BLOCKS)
    table[(torch.tensor(ACTIONS) * powers).sum(-1)] = torch.arange(len(ACTIONS))
    return table[(actions * powers).sum(-1)]


Choose = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called as `choose(block, scripts [n], index of the actions so far [n], used [n])`; returns actions [n]."""


def play(bank: Bank, scripts: torch.Tensor, choose: Choose) -> torch.Tensor:
    """Actions [n, R] of some scripts; what exceeds the budget is not invoked."""
    actions = torch.zeros(len(scripts), BLOCKS, dtype=torch.long)
    for block in range(BLOCKS):
        used = (actions > 0).sum(-1)
        chosen = choose(block, scripts, index_of(actions), used)
        actions[:, block] = torch.where(used < BUDGET, chosen, torch.zeros_like(chosen))
    return actions


def by_model(bank: Bank, invoker: Invoker, draw: torch.Generator | None) -> Choose:
    """The model's choice: sampled, or without a generator the most probable."""

    @torch.no_grad()
    def choose(block: int, scripts: torch.Tensor, index: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        log_probs = invoker.log_probs(bank.states[scripts, index, block], bank.rest[scripts, index, block], used)
        if draw is None:
            return log_probs.argmax(-1)
        return torch.multinomial(log_probs.exp(), 1, generator=draw)[:, 0]

    return choose


def chosen_log_probs(bank: Bank, invoker: Invoker, scripts: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, R] of actions, under the distributions they were drawn from."""
    found, before = [], torch.zeros_like(actions)
    for block in range(BLOCKS):
        index, used = index_of(before), (before > 0).sum(-1)
        log_probs = invoker.log_probs(bank.states[scripts, index, block], bank.rest[scripts, index, block], used)
        found.append(log_probs.gather(-1, actions[:, block, None])[:, 0])
        before = before.clone()
        before[:, block] = actions[:, block]
    return torch.stack(found, 1)


def stage_two(model: Any, bank: Bank, plan: InvocationPlan, seed: int) -> dict[str, float]:
    """Stage II, invocation: trains the invocation tokens' head rows and biases of the active VisMem, nothing else.

    Returns:
        Means over the last tenth of the steps: `S`, `dS`, `p_type`, `p_neg`, `kl`, `invocations`.
    """
    invoker = Invoker.of(model)
    draw = torch.Generator().manual_seed(5000 + seed)
    with torch.no_grad():  # a bias to begin with
        level = (bank.states @ invoker.heads.T).mean((0, 1, 2))
        invoker.biases.copy_(bank.rest.mean() + plan.start - level)
    start = Invoker(invoker.heads.detach().clone(), invoker.biases.detach().clone())
    trained = [invoker.heads, invoker.biases]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=plan.lr)
    scores, log = bank.scores, []
    for _ in range(plan.steps):
        prompts = torch.randint(len(scores), (plan.prompts,), generator=draw)
        scripts = prompts.repeat_interleave(plan.group)
        actions = play(bank, scripts, by_model(bank, invoker, draw))
        invoked = (actions > 0).any(-1)
        s = scores[scripts, index_of(actions)]
        other = scores[scripts, index_of(torch.where(actions > 0, 3 - actions, actions))]
        p_type, p_neg = penalty(s, other, invoked), penalty(s, group_means(s, plan.group), invoked)
        gain, count = memory_gain(s, scores[scripts, 0]), (actions > 0).sum(-1)
        reward = invocation_objective(gain, p_type, p_neg, count, plan.alpha, plan.cost)
        log_probs = chosen_log_probs(bank, invoker, scripts, actions)
        reference = chosen_log_probs(bank, start, scripts, actions)
        losses = clipped_loss(log_probs, log_probs, group_advantages(reward, plan.group), plan.clip)
        losses = losses + plan.beta * kl_to(log_probs, reference)
        loss = trajectory_mean(losses, torch.ones_like(actions, dtype=torch.bool)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            kl = kl_to(log_probs, reference).mean()
            log.append([float(x.float().mean()) for x in (s, gain, p_type, p_neg, kl, count)])
    names = ("S", "dS", "p_type", "p_neg", "kl", "invocations")
    last = np.mean(log[-max(1, plan.steps // 10) :], axis=0)
    return {name: round(float(value), 5) for name, value in zip(names, last, strict=True)}


# Policies to compare with


def at_random(probability: float, types: tuple[int, ...], draw: torch.Generator) -> Choose:
    """Invoke with a probability, either of `types` equally likely."""

    def choose(block: int, scripts: torch.Tensor, index: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        yes = torch.rand(len(scripts), generator=draw) < probability
        kind = torch.tensor(types)[torch.randint(len(types), (len(scripts),), generator=draw)]
        return torch.where(yes, kind, torch.zeros_like(kind))

    return choose


def by_schedule(actions: tuple[int, ...]) -> Choose:
    """The same actions whatever comes."""
    return lambda block, scripts, index, used: torch.full((len(scripts),), actions[block])


def best_schedule(bank: Bank) -> tuple[int, ...]:
    """The fixed actions that are best on average."""
    return ACTIONS[int(bank.scores.mean(0).argmax())]


def by_clock(bank: Bank, threshold: float, kind: int) -> Choose:
    """Invoke when `threshold` tokens have passed since the last memory, or since the beginning."""
    outcomes = torch.tensor(ACTIONS)

    def choose(block: int, scripts: torch.Tensor, index: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        times, before = bank.times[scripts], outcomes[index, :block] > 0
        last = torch.where(before, times[:, :block], torch.zeros_like(times[:, :block])).amax(-1) if block else 0
        return torch.where(times[:, block] - last > threshold, kind, 0)

    return choose


def best_clock(bank: Bank) -> tuple[float, int]:
    """The threshold and type that are best on these scripts."""
    scripts = torch.arange(len(bank.scores))
    thresholds = range(0, int(bank.times.max()), 50)
    return max(
        itertools.product(map(float, thresholds), KINDS),
        key=lambda rule: float(bank.scores[scripts, index_of(play(bank, scripts, by_clock(bank, *rule)))].mean()),
    )
