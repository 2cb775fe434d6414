"""Pretraining a base that knows all tasks of `keepsight.lab.tasks`, in short narrations and with jumping positions.

As in `keepsight.lab.pretraining`: alignment (each visual token must decode to its digit, cell, colour and paper), dense
look-ups, then short narrations of all kinds of facts. What a base cannot do in short outputs, no memory can bring back
in long ones, so `record["short_accuracy"]` says for every task how well it does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from keepsight.lab.digits import CELLS
from keepsight.lab.pretraining import (
    PRETRAINING_RECORD,
    Progress,
    jumping_positions,
    one_thread,
    optimiser_step,
    set_lr,
    visual_tokens,
)
from keepsight.lab.reference import HEAD_DIM, build_model, build_processor, load_reference, save_reference
from keepsight.lab.tasks import (
    COLOURS,
    ID,
    PAPERS,
    PATH_CELLS,
    TASKS,
    WORDS,
    TaskBatch,
    draw_scene,
    facts_for_length,
    make_batch,
)

MIXTURE = {"read": 3, "colour": 2, "locate": 3, "count": 3, "path": 4, "rows": 3, "pair": 3, "recall": 2}
"""How often narrations are about each task."""


@dataclass(frozen=True)
class TaskPretrainConfig:
    """How a base for all tasks is made.

    Attributes:
        seed: of the initial weights and of all data.
        align_steps, dense_steps, short_steps: optimiser steps of the three stages; the dense stage stops early once it
            reads.
        max_jump: largest single jump of the position ids.
        tasks: what the short narrations are about. With all of them, `locate`, `count`, `path` and `rows` are still
            near chance after 700 short steps, and take their share from the others.
    """

    seed: int = 0
    align_steps: int = 250
    dense_steps: int = 400
    short_steps: int = 900
    max_jump: int = 3000
    tasks: tuple[str, ...] = tuple(MIXTURE)


def pretrain_tasks(out: Path, config: TaskPretrainConfig, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Make a base and write it to the folder `out`; returns its record, as `pretraining.json` holds it."""
    rng = np.random.default_rng([config.seed, 9])
    processor, model = build_processor(WORDS), build_model(config.seed, HEAD_DIM, WORDS).train()
    with one_thread():
        _align(model, processor, config, rng, progress)
        model.model.visual.requires_grad_(False)
        dense = _dense(model, processor, config, rng, progress)
        _short(model, processor, config, rng, progress)
        save_reference(model.eval(), out, processor)
        model, processor = load_reference(out)
        short = {name: task_accuracy(model, processor, name, 40, 64, config.seed) for name in config.tasks}
    record = {
        "config": asdict(config),
        "dense_steps": dense,
        "short_accuracy": {name: round(found, 4) for name, found in short.items()},
        "torch": torch.__version__,
    }
    (out / PRETRAINING_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _align(
    model: Any, processor: Any, config: TaskPretrainConfig, rng: np.random.Generator, progress: Progress
) -> None:
    decoder = model.model.language_model
    words = decoder.embed_tokens.weight
    optimizer = torch.optim.AdamW([*model.model.visual.parameters(), words], lr=3e-3, weight_decay=0.0)
    heads = [slice(ID[first], ID[first] + size) for first, size in (("0", 10), ("a1", 16), ("red", len(COLOURS)))]
    heads.append(slice(ID[PAPERS[0]], ID[PAPERS[0]] + 2))
    for step in range(config.align_steps):
        set_lr(optimizer, 3e-3 * min(1.0, (step + 1) / 30) * max(0.05, 1 - step / config.align_steps))
        scene = draw_scene(32, "train", rng)
        pixels = processor.image_processor(images=[image for row in scene.images for image in row], return_tensors="pt")
        states = decoder.norm(visual_tokens(model, pixels))
        truth = (scene.digits, np.tile(np.arange(len(CELLS)), 32), scene.colours, np.repeat(scene.papers, len(CELLS)))
        loss = sum(
            F.cross_entropy(states @ words[rows].T, torch.from_numpy(np.asarray(answer).reshape(-1)))
            for rows, answer in zip(heads, truth, strict=True)
        )
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress("align", step + 1, config.align_steps)


def _dense(model: Any, processor: Any, config: TaskPretrainConfig, rng: np.random.Generator, progress: Progress) -> int:
    step_on, recent = optimiser_step(model), []
    for step in range(config.dense_steps):
        name = ("read", "colour")[step % 2]
        batch = make_batch(processor, [(0, name)] * 14, 16, "train", rng)
        recent.append(step_on(batch, 1e-3 * min(1.0, (step + 1) / 100), text_weight=0.05))
        progress("dense", step + 1, config.dense_steps)
        if len(recent) >= 100 and np.mean(recent[-30:]) > 0.95:
            return step + 1
    return config.dense_steps


def _short(
    model: Any, processor: Any, config: TaskPretrainConfig, rng: np.random.Generator, progress: Progress
) -> None:
    step_on = optimiser_step(model)
    for step in range(config.short_steps):
        batch = make_batch(processor, short_facts(rng, config.tasks), 32, "train", rng)
        positions = None
        if config.max_jump and rng.random() < 0.8:
            positions = jumping_positions(model, batch, rng, config.max_jump)
        lr = 1e-3 * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / config.short_steps)))
        step_on(batch, lr, text_weight=0.2, position_ids=positions)
        progress("short", step + 1, config.short_steps)


def short_facts(
    rng: np.random.Generator, tasks: Sequence[str] = tuple(MIXTURE), tokens: int = 48, max_gap: int = 4
) -> list[tuple[int, str]]:
    """Facts of a narration of about `tokens` tokens at most: of one task, or of two that can share a narration."""
    weights = np.asarray([MIXTURE[name] for name in tasks], float)
    chosen = [str(name) for name in rng.choice(tasks, 2, replace=True, p=weights / weights.sum())]
    if "pair" in chosen:
        chosen = ["pair"]
    notes = int(rng.integers(2, 5)) if "recall" in chosen else 0
    facts: list[tuple[int, str]] = [(0, "note")] * notes
    used = 4 * notes
    left = {name: TASKS[name].most for name in chosen} | ({"recall": notes} if notes else {})
    while used < tokens and any(left.values()):
        name = str(rng.choice([name for name in left if left[name]]))
        gap = int(rng.integers(0, max_gap + 1))
        facts.append((gap, name))
        left[name] -= 1
        used += gap + (2 * PATH_CELLS + 2 if name == "path" else 4)
    return facts


@torch.no_grad()
def task_accuracy(
    model: Any, processor: Any, task: str, length: int, rows: int, seed: int, split: Any = "validation", parts: int = 1
) -> float:
    """Teacher-forced accuracy of the last facts, of `task`, in narrations of about `length` generated tokens."""
    rng = np.random.default_rng([seed, length, list(TASKS).index(task)])
    right = []
    for _ in range(parts):
        batch: TaskBatch = make_batch(processor, facts_for_length(task, length), rows // parts, split, rng)
        logits = model(**batch.model_inputs(), use_cache=False).logits
        right.append(logits[:, batch.answers - 1].argmax(-1) == batch.truth())
    return torch.cat(right).float().mean().item()
