"""Pretraining a base that knows the tasks of `studies.tasks.tasks`, in short narrations and with jumping positions.

As in `keepsight.lab.pretraining`: alignment (each visual token must decode to its digit, cell, colour and paper), dense
look-ups, then short narrations. Three things let a model of this size learn more than reading within minutes:

- **Every row is full of questions.** Dense rows hold facts of all tasks and no filler, and tasks are drawn the more
  often, the worse the model is at them.
- **The word before.** Two images, recall and sums along a path need two words at once (`dark_paper b3`, `recall opal`,
  the sum so far and the next cell). In the dense stage, the state behind the second layer must also tell the word
  before, through a linear map that is dropped afterwards. Without this help, such tasks stay at what one of the two
  words tells (LOG.md).
- **Muon** (of torch) for the matrices, AdamW for the rest.

What a base cannot do in short outputs, no memory can bring back in long ones, so `record["short_accuracy"]` says for
every task how well it does.
"""

from __future__ import annotations

import json
import math
import zlib
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
    narration_loss,
    one_thread,
    set_lr,
    visual_tokens,
)
from keepsight.lab.reference import HEAD_DIM, build_model, build_processor, load_reference, save_reference
from studies.tasks.tasks import (
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

LEARNT = ("read", "colour", "path", "pair", "recall")
"""What a base of this size learns within minutes (LOG.md says what it does not)."""
KNOWN = 0.92
"""Accuracy on every task, on augmented train glyphs, that ends the dense stage."""
SIZES = {name: {"locate": 5, "rows": 5, "path": 2 * PATH_CELLS + 2}.get(name, 4) for name in TASKS}
"""Tokens of a fact."""


@dataclass(frozen=True)
class TaskPretrainConfig:
    """How a base for several tasks is made. Chosen on validation glyphs of seed 0.

    Attributes:
        seed: of the initial weights and of all data.
        align_steps, dense_steps, short_steps: optimiser steps of the three stages; the dense stage stops early once
            every task is known.
        dense_tokens, dense_rows: of a batch of the dense stage.
        dense_peak: step of the dense stage from which on the learning rates fall as one over the steps.
        short_tokens, short_rows: of a batch of short narrations.
        short_pace: learning rates at the beginning of their stage, as a share of the peak.
        long_every: every so many steps of the dense and of the short stage, the word before is also told in long texts,
            in which no answer is trained.
        long_tokens, long_rows: of such texts.
        matrix_lr, lr: peak learning rates of Muon and of AdamW.
        decay: weight decay of the matrices. Without it, states grow to a hundred times the embeddings' size, and what a
            memory adds to them is lost (LOG.md).
        word_before: weight of telling the word before.
        max_jump: largest single jump of the position ids.
        tasks: what the base is to know.
        begin: tasks of the base that it goes on from; none: from nothing. A base that goes on is not aligned again.
    """

    seed: int = 0
    align_steps: int = 250
    dense_steps: int = 1000
    short_steps: int = 500
    dense_tokens: int = 96
    dense_peak: int = 150
    dense_rows: int = 16
    short_tokens: int = 48
    short_rows: int = 16
    short_pace: float = 0.35
    long_every: tuple[int, int] = (4, 2)
    long_tokens: int = 1024
    long_rows: int = 2
    matrix_lr: float = 0.015
    lr: float = 2e-3
    decay: float = 0.5
    word_before: float = 0.5
    max_jump: int = 3000
    tasks: tuple[str, ...] = LEARNT
    begin: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A folder's name that tells one plan from another."""
        return f"tasks-{zlib.crc32(json.dumps(asdict(self), sort_keys=True).encode()):08x}-{self.seed}"


class Diet:
    """Which tasks are drawn: the more often, the worse the model is at them.

    Args:
        tasks: all tasks.

    Attributes:
        accuracy: running accuracy on each.
    """

    FLOOR, SPEED = 0.05, 0.1

    def __init__(self, tasks: Sequence[str]):
        self.accuracy = dict.fromkeys(tasks, 0.0)

    def draw(self, rng: np.random.Generator, tokens: int, max_gap: int) -> list[tuple[int, str]]:
        """Facts of one narration of about so many tokens, each behind 0 to `max_gap` words of filler.

        Tasks about one image share a narration; `pair`, and videos of each number of frames, have their own.
        """
        alone = [name for name in self.accuracy if TASKS[name].images == 1]
        left = {name: TASKS[name].most for name in alone}
        if "pair" in self.accuracy and (not alone or rng.random() < self._share_of_pairs(alone)):
            left = {"pair": TASKS["pair"].most}
        if not left:  # videos
            weights = np.asarray([self._need(name) for name in self.accuracy])
            left = {str(rng.choice(list(self.accuracy), p=weights / weights.sum())): 32}
        chosen: list[tuple[int, str]] = []
        used = 0
        while used < tokens and (open_ := [name for name in left if left[name]]):
            weights = np.asarray([self._need(name) for name in open_])
            name, gap = str(rng.choice(open_, p=weights / weights.sum())), int(rng.integers(0, max_gap + 1))
            left[name] -= 1
            chosen.append((gap, name))
            used += gap + SIZES[name] + (SIZES["note"] if name == "recall" else 0)
        return [(0, "note")] * sum(name == "recall" for _, name in chosen) + chosen

    def taste(self, batch: TaskBatch, logits: torch.Tensor) -> None:
        """Take note of what the model [B, T, V] said to a batch."""
        right = (logits[:, batch.answers - 1].argmax(-1) == batch.truth()).float().mean(0).tolist()
        for name in set(batch.tasks):
            found = float(np.mean([r for r, task in zip(right, batch.tasks, strict=True) if task == name]))
            self.accuracy[name] += self.SPEED * (found - self.accuracy[name])

    def _need(self, name: str) -> float:
        return 1 + self.FLOOR - self.accuracy[name]

    def _share_of_pairs(self, others: Sequence[str]) -> float:
        share = self._need("pair") / float(np.mean([self._need(name) for name in others]))
        return min(0.5, max(0.15, 0.25 * share))


def pretrain_tasks(
    out: Path, config: TaskPretrainConfig, progress: Progress = lambda *_: None, start: Path | None = None
) -> dict[str, Any]:
    """Make a base and write it to the folder `out`; returns its record, as `pretraining.json` holds it.

    `start` is the folder of the base that it goes on from, for a plan that has a `begin`.
    """
    rng = np.random.default_rng([config.seed, 9])
    if start is None:
        processor, model = build_processor(WORDS), build_model(config.seed, HEAD_DIM, WORDS).train()
    else:
        model, processor = load_reference(start)
        model.train()
    with one_thread():
        if start is None:
            _align(model, processor, config, rng, progress)
        model.model.visual.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            before = _WordBefore(model.config.text_config.hidden_size)
        diet = Diet(config.tasks)
        dense = _dense(processor, _Stepper(model, config, diet, before), config, rng, progress)
        _short(processor, _Stepper(model, config, diet, before), config, rng, progress)
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


class _WordBefore(torch.nn.Module):
    """Tells the word before each from the state behind the second layer."""

    def __init__(self, width: int):
        super().__init__()
        self.map = torch.nn.Linear(width, width, bias=False)

    def loss(self, state: torch.Tensor, words: torch.Tensor, batch: TaskBatch) -> torch.Tensor:
        """Cross-entropy of the word before, at all generated words but the first. `state` [B, T, D], `words` [V, D]."""
        mapped = self.map(state[:, batch.start + 1 :])
        told = F.rms_norm(mapped, mapped.shape[-1:]) @ words.T
        return F.cross_entropy(told.transpose(1, 2), batch.input_ids[:, batch.start : -1])


class _Stepper:
    """Optimiser steps over what is trainable of a model, and over what tells the word before."""

    def __init__(self, model: Any, config: TaskPretrainConfig, diet: Diet, before: _WordBefore):
        self.model, self.config, self.diet, self.before = model, config, diet, before
        self.words = model.model.language_model.embed_tokens.weight
        self.trained = [*(p for p in model.parameters() if p.requires_grad), *before.parameters()]
        matrices = [p for p in self.trained if p.ndim == 2 and p is not self.words]
        kept = {id(p) for p in matrices}
        others = [p for p in self.trained if id(p) not in kept]
        self.muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=config.decay)
        self.adam = torch.optim.AdamW(others, lr=config.lr, weight_decay=0.0, betas=(0.9, 0.99))

    def step(self, batch: TaskBatch, pace: float, text_weight: float, position_ids: torch.Tensor | None = None) -> None:
        """One step on the answers, all words by `text_weight`, and the word before."""
        output = self._forward(batch, position_ids)
        self.diet.taste(batch, output.logits.detach())
        loss, _ = narration_loss(output.logits, batch, text_weight)
        self._update(loss + self._told(output, batch), pace)

    def step_on_long_text(self, processor: Any, rng: np.random.Generator, pace: float) -> None:
        """One step on the word before alone, in texts whose answers do not count."""
        facts = self.diet.draw(rng, self.config.long_tokens, self.config.long_tokens // 16)
        batch = make_batch(processor, facts, self.config.long_rows, "train", rng)
        self._update(self._told(self._forward(batch, None), batch), pace)

    def _forward(self, batch: TaskBatch, position_ids: torch.Tensor | None) -> Any:
        return self.model(**batch.model_inputs(), position_ids=position_ids, use_cache=False, output_hidden_states=True)

    def _told(self, output: Any, batch: TaskBatch) -> torch.Tensor:
        return self.config.word_before * self.before.loss(output.hidden_states[2], self.words, batch)

    def _update(self, loss: torch.Tensor, pace: float) -> None:
        set_lr(self.muon, self.config.matrix_lr * pace)
        set_lr(self.adam, self.config.lr * pace)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimizer in (self.muon, self.adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _dense(
    processor: Any, stepper: _Stepper, config: TaskPretrainConfig, rng: np.random.Generator, progress: Progress
) -> int:
    """Returns the number of steps that it took until every task was known."""
    for step in range(config.dense_steps):
        pace = min((step + 1) / 50, 1.0, config.dense_peak / (step + 1))
        if step % config.long_every[0] == 0:
            stepper.step_on_long_text(processor, rng, pace)
        facts = stepper.diet.draw(rng, config.dense_tokens, 0)
        stepper.step(make_batch(processor, facts, config.dense_rows, "train", rng), pace, 0.05)
        progress("dense", step + 1, config.dense_steps)
        if min(stepper.diet.accuracy.values()) > KNOWN:
            return step + 1
    return config.dense_steps


def _short(
    processor: Any, stepper: _Stepper, config: TaskPretrainConfig, rng: np.random.Generator, progress: Progress
) -> None:
    for step in range(config.short_steps):
        pace = config.short_pace * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / config.short_steps)))
        if step % config.long_every[1] == 0:
            stepper.step_on_long_text(processor, rng, pace)
        facts = stepper.diet.draw(rng, config.short_tokens, 4)
        batch = make_batch(processor, facts, config.short_rows, "train", rng)
        positions = None
        if config.max_jump and rng.random() < 0.8:
            positions = jumping_positions(stepper.model, batch, rng, config.max_jump)
        stepper.step(batch, pace, 0.2, positions)
        progress("short", step + 1, config.short_steps)


def short_facts(
    rng: np.random.Generator, tasks: Sequence[str] = LEARNT, tokens: int = 48, max_gap: int = 4
) -> list[tuple[int, str]]:
    """Facts of a narration of about `tokens` tokens: of one task, or of two that can share a narration."""
    chosen = [str(name) for name in rng.choice(list(tasks), 2)]
    if len({TASKS[name].images for name in chosen}) > 1:
        chosen = chosen[:1]
    return Diet(chosen).draw(rng, tokens, max_gap)


def questions(
    processor: Any, task: str, length: int, rows: int, seed: int, split: Any = "validation", budget: int = 12288
) -> list[TaskBatch]:
    """Narrations of about `length` generated tokens whose last facts are of `task`, in batches of at most `budget`
    tokens; the same for the same seed."""
    rng = np.random.default_rng([seed, length, list(TASKS).index(task)])
    parts = max(1, min(rows // 2, math.ceil(rows * (length + 48) / budget)))
    facts = facts_for_length(task, length)
    return [make_batch(processor, facts, len(part), split, rng) for part in np.array_split(np.arange(rows), parts)]


@torch.no_grad()
def task_accuracy(
    model: Any, processor: Any, task: str, length: int, rows: int, seed: int, split: Any = "validation"
) -> float:
    """Teacher-forced accuracy of the last facts, of `task`, in narrations of about `length` generated tokens."""
    right = []
    for batch in questions(processor, task, length, rows, seed, split):
        logits = model(**batch.model_inputs(), use_cache=False).logits
        right.append(logits[:, batch.answers - 1].argmax(-1) == batch.truth())
    return torch.cat(right).float().mean().item()
