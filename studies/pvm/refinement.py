"""Stage 2 of PVM in the lab: GRPO on the language model and the memory together, vision frozen (paper, training).

Facts do not depend on each other, so every fact of a narration is a prompt of its own: G digits are drawn for it from
the model's own distribution, rewarded by whether they are right, and the transcript goes on with the true digit. One
forward thus scores B x F groups of G completions. One update per draw, so every ratio is 1 and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.lab.experiments import TrainPlan, training_batch
from keepsight.train.vismem.grpo import clipped_loss, group_advantages


@dataclass(frozen=True)
class RefinePlan:
    """How a trained model is refined.

    Attributes:
        steps: updates.
        group: G, digits drawn for each fact.
        lr: constant learning rate, as in the paper.
        clip: of the ratio.
        adapters_only: train what the adapter trained, and nothing of the language model.
    """

    steps: int = 80
    group: int = 16
    lr: float = 3e-5
    clip: float = 0.2
    adapters_only: bool = False


def refine(
    model: Any,
    processor: Any,
    plan: TrainPlan,
    refining: RefinePlan,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Refine a trained model in place, on narrations as long as those it was trained on.

    Args:
        model: what `experiments.train` returned; its decoder and its adapter are trained from here on.
        processor: of the base.
        plan: of the narrations: batch, facts, gaps.
        refining: of the updates.
        seed: of data and draws.
        progress: called after every update.

    Returns:
        `reward_first` and `reward_last`: mean reward of the first and last ten updates.
    """
    for name, parameter in model.named_parameters() if not refining.adapters_only else ():
        parameter.requires_grad_("visual." not in name)  # all but the vision tower; a memory's name is visual_memory
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=refining.lr, weight_decay=0.0, betas=(0.9, 0.99))
    rng, generator = np.random.default_rng([seed, 6000]), torch.Generator().manual_seed(6000 + seed)
    rewards: list[float] = []
    model.train()
    for step in range(refining.steps):
        batch = training_batch(processor, plan, plan.warmup_steps, rng)  # past the warm-up: full length
        logits = model(**batch.model_inputs(), use_cache=False).logits[:, batch.answers - 1].flatten(0, 1).float()
        log_probs = logits.log_softmax(-1)  # [B F, V]
        drawn = torch.multinomial(log_probs.detach().exp(), refining.group, replacement=True, generator=generator)
        right = (drawn == batch.truth().flatten()[:, None]).float()  # [B F, G]
        chosen = log_probs.gather(1, drawn).flatten()[:, None]  # [B F G, 1]
        advantages = group_advantages(right.flatten(), refining.group)
        loss = clipped_loss(chosen, chosen.detach(), advantages, refining.clip).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rewards.append(right.mean().item())
        if progress is not None:
            progress(step + 1, refining.steps)
    model.eval()
    return {"reward_first": float(np.mean(rewards[:10])), "reward_last": float(np.mean(rewards[-10:]))}
