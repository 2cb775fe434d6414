"""The warm start (ours, not in the paper) as the first part of stage I."""

from __future__ import annotations

from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.train.run.preflight import Say
from keepsight.train.vismem.prompts import Order
from keepsight.train.vismem.rollout import padding_id, stack_prompts
from keepsight.train.vismem.settings import FormationSettings
from keepsight.train.vismem.trainer import VisMemTrainer
from keepsight.train.vismem.warm_start import distill


def warm_up(trainer: VisMemTrainer, settings: FormationSettings, say: Say) -> Any:
    """Distil the images' own visual embeddings into the memory; every process does the same."""
    model, questions = trainer.model, trainer.questions
    order = Order(len(questions), settings.warm_start_batch, settings.seed + 1)
    pad = padding_id(Backbone.of(model).model)

    class Batches:
        """Model inputs of one warm-start step after the other."""

        def __iter__(self) -> Any:
            for step in range(settings.warm_start_steps):
                yield stack_prompts([questions[i].inputs for i in order.batch(step)], pad)

    say(f"warm start (latent distillation, ours, not in the paper): {settings.warm_start_steps} steps")
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        report = distill(
            model,
            Batches(),
            steps=settings.warm_start_steps,
            lr=settings.warm_start_lr,
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required[name])
    model.eval()
    errors = ", ".join(f"{kind} {report.first[kind]:.3f} -> {report.last[kind]:.3f}" for kind in report.last)
    say(f"warm start done in {report.seconds:.1f} s; relative squared error: {errors}")
    return report
