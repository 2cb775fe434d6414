"""Pretraining the reference VLM from nothing: about a minute or two on one core, the same bits for the same seed.

Three stages, all of which matter:

1. *Alignment*: only vision tower and word embeddings train. Each visual token must decode, through the final norm and
   the tied embedding, to its digit and to its cell's name. This stands in for the image-text pretraining of a real VLM.
2. *Dense look-ups*: fifteen facts without filler. The look-up circuit forms here, as a phase transition.
3. *Short narrations*: at most about 55 generated tokens. Position ids jump forward at random between facts, up to
   3,000 a jump, so that rotary distances of thousands are nothing new to the model while it has never seen more than
   about 55 text keys. What it
   loses in long outputs, it then loses to the number of keys: to dilution, and not to unseen positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from keepsight.lab.digits import CELLS, draw_grids
from keepsight.lab.narration import DIGITS, FILLER, READ, TOKEN, Narrations, TrainingText, make_narrations
from keepsight.lab.reference import HEAD_DIM, build_model, build_processor, load_reference, save_reference

PRETRAINING_RECORD = "pretraining.json"
"""File in a base's folder that says how it was made."""
Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


@dataclass(frozen=True)
class PretrainConfig:
    """How a base is made. The defaults are the shipped base's.

    Attributes:
        seed: of the initial weights and of all data.
        head_dim: width of an attention head.
        align_steps, dense_steps, short_steps: optimiser steps of the three stages; the dense stage stops early once it
            reads.
        max_jump: largest single jump of the position ids in stage 3; 0 gives a base that has only seen short positions
            and whose fall in long outputs is mostly one of rotary range.
    """

    seed: int = 0
    head_dim: int = HEAD_DIM
    align_steps: int = 200
    dense_steps: int = 400
    short_steps: int = 500
    max_jump: int = 3000


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums are then always added in the same order, and small models are no slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pretrain(
    out: str | Path, config: PretrainConfig | None = None, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Make a base and write it to `out` as a checkpoint folder.

    Args:
        out: folder for config, processor, tokenizer and weights.
        config: steps and seed.
        progress: called after every step.

    Returns:
        The configuration and what was measured: the accuracy on *validation* glyphs after alignment and, read back
        from `out`, at the end. The same stands in `out / "pretraining.json"`.
    """
    config = config or PretrainConfig()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)  # an unwritable place is found before the work
    rng = np.random.default_rng(config.seed)
    processor = build_processor()
    model = build_model(config.seed, config.head_dim).train()
    with one_thread():
        aligned = _align(model, processor, config, rng, progress)
        model.model.visual.requires_grad_(False)
        dense = _dense(model, processor, config, rng, progress)
        _short(model, processor, config, rng, progress)
        save_reference(model.eval(), out)
        model, processor = load_reference(out)  # what is measured is what was written, rounding included
        final = short_accuracy(model, processor, rows=128, seed=config.seed)
    record = {
        "config": asdict(config),
        "aligned_accuracy": round(aligned, 4),
        "dense_steps": dense,
        "short_accuracy": round(final, 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (out / PRETRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _align(model: Any, processor: Any, config: PretrainConfig, rng: np.random.Generator, progress: Progress) -> float:
    """Stage 1. Returns the accuracy of visual tokens decoded to digits, on validation glyphs."""
    decoder = model.model.language_model
    words = decoder.embed_tokens.weight
    digit_rows = slice(TOKEN[DIGITS[0]], TOKEN[DIGITS[0]] + len(DIGITS))
    cell_rows = slice(TOKEN[CELLS[0]], TOKEN[CELLS[0]] + len(CELLS))
    optimizer = torch.optim.AdamW([*model.model.visual.parameters(), words], lr=3e-3, weight_decay=0.0)

    def decode(rows: int, split: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, digits = draw_grids(rows, split, rng)
        pixels = processor.image_processor(images=images, return_tensors="pt")
        return decoder.norm(visual_tokens(model, pixels)), torch.from_numpy(digits.reshape(-1))

    for step in range(config.align_steps):
        set_lr(optimizer, 3e-3 * min(1.0, (step + 1) / 30) * max(0.05, 1 - step / config.align_steps))
        states, digits = decode(32, "train")
        cells = torch.arange(len(CELLS)).repeat(32)
        loss = F.cross_entropy(states @ words[digit_rows].T, digits) + F.cross_entropy(
            states @ words[cell_rows].T, cells
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress("align", step + 1, config.align_steps)
    with torch.no_grad():
        states, digits = decode(64, "validation")
        return ((states @ words[digit_rows].T).argmax(-1) == digits).float().mean().item()


def visual_tokens(model: Any, pixels: Any) -> torch.Tensor:
    """The projected visual tokens [sum of M, D] of processed images."""
    features = model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
    per_image = getattr(features, "pooler_output", None)
    return torch.cat(list(features[0] if per_image is None else per_image), dim=0)


def _dense(model: Any, processor: Any, config: PretrainConfig, rng: np.random.Generator, progress: Progress) -> int:
    """Stage 2. Returns the number of steps that it took."""
    step_on = optimiser_step(model)
    recent: list[float] = []
    for step in range(config.dense_steps):
        lr = 1e-3 * min(1.0, (step + 1) / 100)
        if step % 4 == 3:
            step_on(_in_reading_order(processor, 16, rng), lr, text_weight=0.5)
        else:
            batch = make_narrations(processor, [0] * (len(CELLS) - 1), 16, "train", rng)
            recent.append(step_on(batch, lr, text_weight=0.05))
        progress("dense", step + 1, config.dense_steps)
        if len(recent) >= 100 and np.mean(recent[-30:]) > 0.95:
            return step + 1
    return config.dense_steps


def _short(model: Any, processor: Any, config: PretrainConfig, rng: np.random.Generator, progress: Progress) -> None:
    """Stage 3."""
    step_on = optimiser_step(model)
    for step in range(config.short_steps):
        lr = 1e-3 * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / config.short_steps)))
        if ordered := rng.random() < 0.2:
            batch = _in_reading_order(processor, 32, rng)
        else:
            batch = make_narrations(processor, rng.integers(0, 6, rng.integers(5, 8)).tolist(), 32, "train", rng)
        positions = None
        if config.max_jump and rng.random() < 0.8:
            positions = jumping_positions(model, batch, rng, config.max_jump)
        step_on(batch, lr, text_weight=1.0 if ordered else 0.3, position_ids=positions)
        progress("short", step + 1, config.short_steps)


def _in_reading_order(processor: Any, rows: int, rng: np.random.Generator) -> Narrations:
    """All sixteen facts from a1 to d4: the answer to `read`, and to any prompt in words that the model does not
    know."""
    strange = " ".join(rng.choice(["image", "please", *FILLER], rng.integers(1, 9)))
    prompt = READ if rng.random() < 0.5 else strange
    return make_narrations(processor, [0] * len(CELLS), rows, "train", rng, prompt=prompt, ordered=True)


def jumping_positions(model: Any, batch: TrainingText, rng: np.random.Generator, max_jump: int) -> torch.Tensor:
    """Position ids [3, B, T] that jump ahead before a fact with probability one half, by 1 to `max_jump`
    (log-uniform)."""
    positions, _ = model.model.get_rope_index(
        input_ids=batch.input_ids,
        mm_token_type_ids=batch.inputs["mm_token_type_ids"],
        image_grid_thw=batch.inputs["image_grid_thw"],
    )
    jumps = torch.zeros(batch.input_ids.shape[1], dtype=torch.long)
    for start in batch.boundaries:
        if rng.random() < 0.5:
            jumps[start] += int(math.exp(rng.uniform(0.0, math.log(max_jump))))
    return positions + jumps.cumsum(0)


def narration_loss(logits: torch.Tensor, batch: TrainingText, text_weight: float) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the answers plus `text_weight` times that of all generated tokens; and the answers' accuracy.

    Args:
        logits: [B, T, V] of the plain forward.
        batch: what was fed.
        text_weight: weight of the structure (filler, cells, full stops), which is no matter of seeing.
    """
    predicted = logits[:, batch.start - 1 : -1].float()
    target = batch.input_ids[:, batch.start :]
    each = F.cross_entropy(predicted.transpose(1, 2), target, reduction="none")
    at = batch.lengths
    accuracy = (predicted[:, at].argmax(-1) == target[:, at]).float().mean().item()
    return each[:, at].mean() + text_weight * each.mean(), accuracy


def optimiser_step(model: Any) -> Callable[..., float]:
    """One optimiser over what is trainable; the returned function makes one step and gives the accuracy of the
    answers."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))

    def step(batch: TrainingText, lr: float, text_weight: float, position_ids: torch.Tensor | None = None) -> float:
        set_lr(optimizer, lr)
        logits = model(**batch.model_inputs(), position_ids=position_ids, use_cache=False).logits
        loss, accuracy = narration_loss(logits, batch, text_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return accuracy

    return step


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def short_accuracy(model: Any, processor: Any, rows: int = 128, seed: int = 0, split: Any = "validation") -> float:
    """Teacher-forced accuracy of six facts with three filler words each (36 generated tokens)."""
    rng = np.random.default_rng([seed, 36])
    batch = make_narrations(processor, [3] * 6, rows, split, rng)
    logits = model(**batch.model_inputs(), use_cache=False).logits
    return (logits[:, batch.answers - 1].argmax(-1) == batch.truth()).float().mean().item()
