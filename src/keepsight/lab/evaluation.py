"""Evaluation on the lab's task: accuracy by length, position and filler controls, attention mass, interventions.

All accuracies are *teacher-forced*: the narration is given, and at each scored digit the model's most probable token
over the whole vocabulary must be the right one. Facts do not depend on each other, so every method is asked exactly
the same questions in exactly the same contexts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.lab.digits import Split
from keepsight.lab.narration import IMAGE_PAD, TOKEN, Narrations, gaps_for_length, make_narrations
from keepsight.pvm import replace_memory

SCORED = 6
"""Facts scored per narration: the last ones, all within about 50 tokens of the nominal length."""
LOCAL_WINDOW = 4
"""Last tokens that stay visible when filler is masked, so that the text itself stays readable."""


@dataclass(frozen=True)
class Score:
    """A mean over `n` answers."""

    accuracy: float
    n: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return (self.accuracy * (1 - self.accuracy) / self.n) ** 0.5

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return {"accuracy": round(self.accuracy, 4), "n": self.n}


def question_batches(
    processor: Any, length: int, rows: int, seed: int, split: Split = "test", budget: int = 16384
) -> list[Narrations]:
    """Narrations of about `length` generated tokens, in batches of at most `budget` tokens; the same for the same
    seed."""
    if rows < 2:
        raise ValueError(f"rows={rows}: at least two images are needed, so that a memory can hold another one's.")
    rng = np.random.default_rng([seed, length])
    parts = max(1, min(rows // 2, math.ceil(rows * (length + 32) / budget)))
    gaps = gaps_for_length(length, scored=SCORED)
    return [make_narrations(processor, gaps, len(part), split, rng) for part in np.array_split(np.arange(rows), parts)]


@torch.no_grad()
def answers(model: Any, batch: Narrations, **forward: Any) -> torch.Tensor:
    """The model's most probable tokens [B, SCORED] at the scored answers, by its plain forward."""
    logits = model(**{**batch.model_inputs(), "use_cache": False, **forward}).logits
    return logits[:, batch.answers[-SCORED:] - 1].argmax(-1)


def score(predicted: Sequence[torch.Tensor], batches: Sequence[Narrations], roll: int = 0) -> Score:
    """Compare answers with the truth of the own image, or of the image `roll` rows further up."""
    right = torch.cat([p == b.truth(roll)[:, -SCORED:] for p, b in zip(predicted, batches, strict=True)])
    return Score(right.float().mean().item(), right.numel())


def accuracy(
    model: Any, batches: Sequence[Narrations], forward: Callable[[Narrations], dict[str, Any]] | None = None
) -> Score:
    """Accuracy of the scored answers; `forward` adds keyword arguments to the model's call."""
    model.eval()
    return score([answers(model, batch, **(forward(batch) if forward else {})) for batch in batches], batches)


@torch.no_grad()
def causal_battery(model: Any, batches: Sequence[Narrations], seed: int) -> dict[str, Score]:
    """Is the memory used, and is it the image that it is used for?

    The language model reads its own image in every case; only what the branch remembers changes.

    Returns:
        `on`: as trained. `gate_off`: adapter disabled. `noise`: visual embeddings replaced by Gaussian noise of each
        image's RMS. `swapped`: another image's embeddings, answers scored against the own image. `swapped_follows`:
        the same answers scored against the other image. Two images agree on about one cell in ten by chance.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)

    def noise(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        size = (embeds.square().mean(-1) * valid).sum(1) / valid.sum(1).clamp(min=1)
        drawn = torch.randn(embeds.shape, generator=generator).to(embeds)
        return drawn * size.sqrt()[:, None, None]

    def all_answers() -> list[torch.Tensor]:
        return [answers(model, batch) for batch in batches]

    result = {"on": score(all_answers(), batches)}
    with model.disable_adapter():
        result["gate_off"] = score(all_answers(), batches)
    with replace_memory(noise):
        result["noise"] = score(all_answers(), batches)
    with replace_memory(lambda embeds, valid: embeds.roll(1, 0)):
        swapped = all_answers()
    result["swapped"] = score(swapped, batches)
    result["swapped_follows"] = score(swapped, batches, roll=1)
    return result


def positions(model: Any, batch: Narrations) -> torch.Tensor:
    """The position ids [3, B, T] that the model itself would use."""
    return Backbone.of(model).vlm.get_rope_index(
        input_ids=batch.input_ids,
        mm_token_type_ids=batch.inputs["mm_token_type_ids"],
        image_grid_thw=batch.inputs["image_grid_thw"],
    )[0]


def without_filler(model: Any, batch: Narrations) -> dict[str, Any]:
    """Control: filler words stay where they are but nobody beyond four tokens may attend to them.

    Distances are unchanged and only the number of competing text keys shrinks. If this restores the accuracy, the loss
    was dilution.
    """
    size = batch.input_ids.shape[1]
    row, column = torch.arange(size)[:, None], torch.arange(size)[None, :]
    keep = (column <= row) & (~batch.filler[None, :] | (row - column < LOCAL_WINDOW))
    mask = torch.zeros(size, size).masked_fill(~keep, torch.finfo(torch.float32).min)
    rows = batch.input_ids.shape[0]
    return {"attention_mask": mask[None, None].expand(rows, 1, size, size), "position_ids": positions(model, batch)}


def squeezed(model: Any, batch: Narrations, span: float = 55.0) -> dict[str, Any]:
    """Control: all keys stay, and the narration's positions are squeezed into the `span` of the base's pretraining.

    If this restores the accuracy, the loss was one of rotary range, and not dilution.
    """
    place = positions(model, batch).float()
    first = place[..., batch.start : batch.start + 1]
    tail = place[..., batch.start :] - first
    place[..., batch.start :] = first + tail * min(1.0, span / float(tail.max()))
    return {"position_ids": place}


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Attention weights exist only in the eager implementation; the former one is put back on exit."""
    decoder = Backbone.of(model).decoder
    former = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    try:
        yield
    finally:
        decoder.config._attn_implementation = former


@torch.no_grad()
def attention_mass(model: Any, processor: Any, length: int, rows: int, seed: int, bins: int = 16) -> dict[str, Any]:
    """Visual attention mass Omega_V (paper, section 2) by position in a narration of `length` generated tokens.

    Returns:
        `position`: [P] mean generated tokens of each (log-spaced) bin; `layers`: [L][P] mass, mean over heads, images
        and the bin's positions.
    """
    model.eval()
    edges = np.unique(np.geomspace(1, length + 1, bins + 1).astype(int))
    total = None
    with eager_attention(model):
        for batch in question_batches(processor, length, rows, seed, budget=2 * (length + 32)):
            out = model(**batch.model_inputs(), use_cache=False, output_attentions=True)
            image = (batch.input_ids[0] == TOKEN[IMAGE_PAD]).nonzero().squeeze(1)
            mass = torch.stack([a[:, :, batch.start - 1 :, image].sum(-1).mean((0, 1)) for a in out.attentions])
            share = len(batch.input_ids) / rows
            total = mass * share if total is None else total + mass * share
    assert total is not None
    spans = list(itertools.pairwise(edges.tolist()))
    return {
        "position": [float(a + b - 1) / 2 for a, b in spans],
        "layers": [[round(float(layer[a:b].mean()), 5) for a, b in spans] for layer in total],
    }
