"""A warm start with a reconstruction objective: latents from which *all* of an image's embeddings can be told.

The package's warm start regresses N latents onto N averages of the M visual embeddings. Here a small decoder, which is
thrown away, must also tell every single embedding from the latents, so what averages lose has to be kept somewhere:

    loss = |latents - averages|^2 / |averages|^2  +  |decoder(latents) - embeddings|^2 / |embeddings|^2

The first term keeps the latents readable: the language model that reads them is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from keepsight.train.vismem.moments import look, target
from keepsight.train.vismem.warm_start import distill, pace
from keepsight.vismem import VisMemBranch


class Rebuilder(nn.Module):
    """Tells M embeddings [B, M, D] from N latents [B, N, D]: each place looks at the latents, then a small network."""

    def __init__(self, places: int, width: int, heads: int = 4):
        super().__init__()
        self.places = nn.Parameter(torch.randn(places, width) * 0.1)
        self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        self.tell = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, M, D]."""
        places = self.places.expand(len(latents), -1, -1)
        seen = self.look(places, latents, latents, need_weights=False)[0]
        return seen + self.tell(seen)


def rebuild(
    model: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    steps: int,
    lr: float,
    kind: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train the memory of one type by both terms; the decoder learns beside it. Returns facts for a record."""
    distill(model, batches, steps=1, lr=1e-9, kinds=(kind,))  # starting values
    branch = VisMemBranch.of(model)
    memory, formers = branch.active, branch.formers()
    trained = [p for name, p in memory.named_parameters() if not name.startswith("rows.")]
    decoder: Rebuilder | None = None
    optimizer: torch.optim.Optimizer | None = None
    errors = []
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    memory.train()
    for step in range(steps):
        moment = look(branch, next(batches))
        seen = torch.stack(moment.embeddings).float()  # [B, M, D]
        if decoder is None or optimizer is None:
            decoder = Rebuilder(seen.shape[1], seen.shape[2])
            optimizer = torch.optim.AdamW([*trained, *decoder.parameters()], weight_decay=0.0, betas=(0.9, 0.99))
        for group in optimizer.param_groups:
            group["lr"] = lr * pace(step, steps)
        side, count = branch.backbone.merge_side, formers.length(kind)
        pairs = zip(moment.embeddings, moment.formations, strict=True)
        averages = torch.stack([target(e, count, f.sight, side) for e, f in pairs])
        latents = formers.form(kind, moment.formations).float()
        losses = [_relative(latents, averages), _relative(decoder(latents), seen)]
        sum(losses).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_([*trained, *decoder.parameters()], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        errors.append([float(loss.detach()) for loss in losses])
        if progress is not None:
            progress(step + 1, steps)
    model.eval()
    last = torch.tensor(errors[-max(1, steps // 10) :]).mean(0).tolist()
    return {"warm_last": {kind: last[0]}, "rebuilt_first": errors[0][1], "rebuilt_last": last[1]}


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return ((found - wanted).square().mean((1, 2)) / wanted.square().mean((1, 2)).clamp(min=1e-12)).mean()
