"""What the tests of VisMem's training share: tiny models with a strong memory, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from families import BY_NAME, Row, make_inputs
from vismem_helpers import attach

from keepsight.train.vismem.replay import chosen_mask
from keepsight.train.vismem.rollout import Trajectory, row_seed, sample
from keepsight.vismem import MemoryPolicy

FAMILY_NAMES = ("qwen2_5_vl", "qwen3_vl", "internvl_qwen3", "llava_onevision")
#: Two images with text between, one image, no image.
ROWS = [Row(3, (1, 2), 2, (2, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2), Row(7, seed=3)]
#: Often, and one of the words is a delimiter.
RANDOM = MemoryPolicy("random", probability=0.1, places="anywhere", max_invocations=2)


def model_and_prompts(name: str, **config: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """(model with a strong VisMem, prompts of one row each)."""
    family = BY_NAME[name]
    model = family.build()
    prompts = [make_inputs(family, model, [row]) for row in ROWS]
    return attach(model, delimiter_ids=[7, 8, 9], **config), prompts


def seeds(count: int, name: str = "test") -> list[int]:
    return [row_seed(name, index) for index in range(count)]


def written(
    model: Any, prompts: Any, policy: MemoryPolicy = RANDOM, copies: int = 3, **options: Any
) -> list[Trajectory]:
    return sample(model, prompts, seeds(len(prompts) * copies), policy, copies=copies, max_words=14, **options)


def rolled(model: Any, prompts: Any, policy: MemoryPolicy = RANDOM, **options: Any) -> tuple[list[Trajectory], Any]:
    """Trajectories written in one call, and the log-probabilities [n, T] at which their tokens were chosen."""
    base, outputs = model.get_base_model(), []
    generate = base.generate

    def noting(**given: Any) -> Any:
        outputs.append(generate(**given, output_scores=True))
        return outputs[-1]

    base.generate = noting
    try:
        trajectories = written(model, prompts, policy, **options)
    finally:
        base.generate = generate
    (out,) = outputs
    scores = torch.stack([score.log_softmax(-1) for score in out.scores], 1)
    chosen = chosen_mask(trajectories)
    each = scores.gather(-1, out.sequences[:, -scores.shape[1] :, None])[:, : chosen.shape[1], 0]
    return trajectories, torch.where(chosen, each, 0)
