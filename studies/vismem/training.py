"""Training VisMem on the reference VLM: the warm start, and stage I in the lab's cheap setting.

Stage I here is the paper's, made cheap by what the task is. Facts do not depend on each other and the narration goes on
with the true digits, so a group of G trajectories differs in the sampled digits only: one forward gives the
distributions, and G samples of it are G trajectories, exactly. A memory is invoked once per trajectory, before the
scored facts; of either type in turn; first at the full stop, later anywhere up to the first scored fact (the paper's
curriculum). The reward is the share of scored facts that were told right. There is no KL term, and the gain over the
same prompt without memory is not computed: it is shared by the group and cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from keepsight.backbone import Backbone
from keepsight.lab.digits import CELLS
from keepsight.lab.evaluation import SCORED
from keepsight.lab.narration import TOKEN, Narrations, make_narrations
from keepsight.lab.narration import gaps_for_length as gaps_for
from keepsight.train.run.checksums import checksums
from keepsight.train.vismem.grpo import clipped_loss, group_advantages, token_log_probs, trajectory_mean
from keepsight.train.vismem.warm_start import distill, pace
from keepsight.vismem import VisMemBranch
from studies.tasks.tasks import TaskBatch
from studies.vismem.reading import Reading, decision_column
from studies.vismem.rebuilding import rebuild

Progress = Callable[[int, int], None]
"""Called as `progress(done, total)`."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a lab VisMem is trained. Chosen on validation glyphs of seed 0.

    Attributes:
        kinds: types of memory that are trained.
        warm_steps, warm_lr, warm_batch: the warm start (ours); 0 steps: none, stage I begins from scratch.
        warm_gap: filler words before each of the two facts in the warm start's texts: 0 to this.
        steps, lr, batch: stage I; 0 steps: none.
        group: G, trajectories per prompt.
        clip: of the ratio.
        shortest, longest: generated tokens before stage I's last answer.
        credit: what an advantage belongs to: the whole "trajectory", as in the paper, or each "fact" by itself, so
            that a digit is rewarded for being right and not for its neighbours'.
        rebuild: the warm start's further objective (`studies.vismem.rebuilding`), for one type of memory.
        taught: in place of stage I's rewards, the right answers (supervised): what a memory can be taught at most.
        start: how stage I's long-term slots begin without a warm start: as "noise", or as the "cells": the names of
            the cells, behind which the base would tell their digits.
    """

    kinds: tuple[str, ...] = ("short", "long")
    warm_steps: int = 400
    warm_lr: float = 1e-2
    warm_batch: int = 16
    warm_gap: int = 20
    steps: int = 120
    lr: float = 1e-3
    batch: int = 12
    group: int = 16
    clip: float = 0.2
    shortest: int = 200
    longest: int = 1024
    credit: Literal["trajectory", "fact"] = "trajectory"
    start: Literal["noise", "cells"] = "noise"
    rebuild: bool = False
    taught: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Prompt:
    """What one batch of stage I is about.

    Attributes:
        batch: narrations.
        column: columns of `batch.input_ids` that are read before the memory.
        scored: how many of the last answers are rewarded.
    """

    batch: Narrations | TaskBatch
    column: int
    scored: int


def warm_start(
    model: Any,
    processor: Any,
    plan: TrainingPlan,
    seed: int,
    progress: Progress | None = None,
    batches: Iterator[dict[str, torch.Tensor]] | None = None,
) -> dict:
    """The label-free warm start, on short narrations about train glyphs (or on `batches` of model inputs).

    Returns:
        Facts for a record.
    """
    torch.manual_seed(3000 + seed)
    batches = batches or _warm_batches(processor, plan, np.random.default_rng([seed, 6000]))
    if plan.rebuild:
        (kind,) = plan.kinds
        return rebuild(model, batches, plan.warm_steps, plan.warm_lr, kind, progress)
    report = distill(
        model,
        batches,
        steps=plan.warm_steps,
        lr=plan.warm_lr,
        kinds=plan.kinds,
        on_log=(lambda step, values: progress(step, plan.warm_steps)) if progress else None,
    )
    return {"warm_first": report.first, "warm_last": report.last, "warm_seconds": round(report.seconds, 1)}


def _warm_batches(processor: Any, plan: TrainingPlan, rng: np.random.Generator) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        batch = make_narrations(processor, rng.integers(0, plan.warm_gap, 2).tolist(), plan.warm_batch, "train", rng)
        whole, end = batch.input_ids.shape, int(batch.answers[-1]) + 2
        yield {k: v[:, :end] if v.shape == whole else v for k, v in batch.model_inputs().items()}


def stage_one(
    model: Any,
    processor: Any,
    plan: TrainingPlan,
    seed: int,
    progress: Progress | None = None,
    prompts: Callable[[np.random.Generator], Prompt] | None = None,
) -> dict:
    """Stage I, formation: trains the memory tensors from rewards only; checks that nothing else changed.

    Args:
        model: carries VisMem.
        processor: its processor.
        plan: steps, batch and group.
        seed: of the data and of what is sampled.
        progress: called after every step.
        prompts: makes the batch of a step. Default: narrations about one image, with the paper's curriculum.

    Returns:
        Facts for a record: mean reward of the sampled digits over the first and last tenth of the steps, by type.
    """
    memory = VisMemBranch.of(model).active
    if plan.start == "cells":
        start_at_the_cells(model)
    trained = [p for name, p in memory.named_parameters() if not name.startswith("rows.")]
    kept = {id(p) for p in trained}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in kept]
    before = checksums(model, skip=names)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    model.eval()
    memory.train()
    optimizer = torch.optim.AdamW(trained, lr=plan.lr, weight_decay=0.0, betas=(0.9, 0.99))
    rng, draw = np.random.default_rng([seed, 7000]), torch.Generator().manual_seed(4000 + seed)
    rewards: dict[str, list[float]] = {kind: [] for kind in plan.kinds}
    begin = time.perf_counter()
    for step in range(plan.steps):
        kind = plan.kinds[step % len(plan.kinds)]
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * pace(step, plan.steps)
        prompt = prompts(rng) if prompts else _narrations(processor, plan, step >= plan.steps // 2, rng)
        loss, reward = _episode(model, plan, kind, prompt, draw)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rewards[kind].append(reward)
        if progress is not None:
            progress(step + 1, plan.steps)
    model.eval()
    assert before == checksums(model, skip=names), "stage I may change memory tensors only"
    tenth = max(1, plan.steps // len(plan.kinds) // 5)
    return {
        "stage_one_first": {kind: float(np.mean(r[:tenth])) for kind, r in rewards.items()},
        "stage_one_last": {kind: float(np.mean(r[-tenth:])) for kind, r in rewards.items()},
        "stage_one_seconds": round(time.perf_counter() - begin, 1),
    }


@torch.no_grad()
def start_at_the_cells(model: Any) -> None:
    """Let the long-term slots [N, D] begin as the embeddings of the cells' names, in reading order."""
    slots = VisMemBranch.of(model).active.long_slots
    names = torch.tensor([TOKEN[cell] for cell in CELLS])
    assert len(slots) == len(names), "one slot for each cell"
    slots.copy_(Backbone.of(model).model.get_input_embeddings()(names))


def _narrations(processor: Any, plan: TrainingPlan, anywhere: bool, rng: np.random.Generator) -> Prompt:
    gaps = gaps_for(int(rng.integers(plan.shortest, plan.longest + 1)))
    batch = make_narrations(processor, gaps, plan.batch, "train", rng)
    column = decision_column(batch) + (int(rng.integers(0, gaps[-SCORED] + 1)) if anywhere else 0)
    return Prompt(batch, column, SCORED)


def _episode(
    model: Any, plan: TrainingPlan, kind: str, prompt: Prompt, draw: torch.Generator
) -> tuple[torch.Tensor, float]:
    """One batch of prompts, G trajectories each: the loss and the mean reward."""
    batch, scored = prompt.batch, prompt.scored
    reading = Reading(model, batch, prompt.column)
    reading.remember(kind)
    logits = reading.predict(batch.answers[-scored:])
    probabilities = logits.detach().softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(probabilities, plan.group, replacement=True, generator=draw)  # [B * F, G]
    drawn = drawn.view(plan.batch, scored, plan.group).transpose(1, 2).flatten(0, 1)  # [B * G, F]
    if plan.taught:
        right = batch.truth()[:, -scored:]
        reward = float((logits.detach().argmax(-1) == right).float().mean())
        return F.cross_entropy(logits.flatten(0, 1).float(), right.flatten()), reward
    hits = (drawn.view(plan.batch, plan.group, -1) == batch.truth()[:, None, -scored:]).float()  # [B, G, F]
    log_probs = token_log_probs(logits.repeat_interleave(plan.group, 0), drawn)
    if plan.credit == "fact":  # every fact is a prompt of its own, with G trajectories of one token
        advantages = group_advantages(hits.transpose(1, 2).flatten(), plan.group)
        log_probs = log_probs.view(plan.batch, plan.group, -1).transpose(1, 2).reshape(-1, 1)
    else:
        advantages = group_advantages(hits.mean(-1).flatten(), plan.group)
    losses = clipped_loss(log_probs, log_probs, advantages, plan.clip)
    return trajectory_mean(losses, torch.ones_like(losses, dtype=torch.bool)).mean(), float(hits.mean())
