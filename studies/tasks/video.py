"""Video: what a cell showed at a time, with growing numbers of frames.

Frames are images in order, each behind its time in words, as Qwen3-VL writes videos; every frame has glyphs of its own,
so a cell alone says nothing: an answer needs the frame as well. PVM's memory holds the visual embeddings as they enter
the decoder, and looks them up by content, without positions: whatever tells one frame from another is not in it. So the
share of answers that are right *for another frame* is counted too.
"""

from __future__ import annotations

from typing import Any

import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Bench, Claim, Column, Measured, Plot, Study, TableRow
from studies.tasks.cells import answers, fitted, task_base
from studies.tasks.pretraining import LEARNT, questions
from studies.tasks.tasks import ID, TaskBatch
from studies.tasks.transfer import FAR, LABELS, MEMORY, READING, training_of, unknown

FRAMES = (2, 4)
TASKS = tuple(f"moment_{n}" for n in FRAMES)
"""What is trained and asked: videos of so many frames."""


BASE: dict[str, Any] = {"tasks": list(TASKS), "begin": list(LEARNT), "dense_steps": 500, "short_steps": 200}
"""Bases that go on from those that know five tasks; from nothing it would take minutes more."""


def video_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Train on videos, then ask by number of frames, near and far. Settings: as `fitted` and `at`, `near`, `far`.

    Values:
        for each number of frames: `moment_<n>` and `moment_<n>_near`, accuracy; `mixed_<n>`, far, the share of answers
        that are wrong and right for the same cell in another frame.
    """
    model, processor = task_base(bench, settings["base"], seed)
    model, facts = fitted(bench, settings, seed, model, processor, TASKS)
    values: dict[str, float] = {}
    for count, task in zip(FRAMES, TASKS, strict=True):
        bench.report(f"asking {task}", 0.9)
        for suffix, length in (("", settings["far"]), ("_near", settings["near"])):
            right, mixed = [], []
            for batch in questions(processor, task, length, settings["rows"], seed, settings["split"]):
                told = answers(model, batch, settings)
                right.append(told == batch.truth())
                mixed.append(in_another_frame(batch, told))
            values[f"{task}{suffix}"] = torch.cat(right).float().mean().item()
            if not suffix:
                values[f"mixed_{count}"] = torch.cat(mixed).float().mean().item()
    return Measured(values, settings["rows"] * 4, facts)


def in_another_frame(batch: TaskBatch, told: torch.Tensor) -> torch.Tensor:
    """Which answers [B, A] are wrong, and what the asked cell shows in another frame."""
    cells = batch.input_ids[:, batch.answers - 1] - ID[CELLS[0]]  # [B, A]
    digits = torch.from_numpy(batch.scene.digits) + ID["0"]  # [B, I, 16]
    shown = digits.gather(2, cells[:, None].expand(-1, digits.shape[1], -1))  # [B, I, A]
    return (told != batch.truth()) & (shown == told[:, None]).any(1)


def _keeps(row: str) -> Any:
    def judge(results: Results) -> Judgement:
        gains = {n: results.difference(row, "base", f"moment_{n}") for n in FRAMES}
        words = ", ".join(f"{n} frames {gap.points()}" for n, gap in gains.items())
        mixed = ", ".join(f"{results.at(row, f'mixed_{n}').percent()}" for n in FRAMES)
        before = ", ".join(f"{results.at('base', f'mixed_{n}').percent()}" for n in FRAMES)
        return unknown(results, TASKS) or judged(
            all(gap.low > 0 for gap in gains.values()),
            f"Over the base at {FAR:,} tokens: {words}. Wrong, and right for the same cell in another frame: {mixed} "
            f"(base: {before}). (Holds if all gains are surely above zero.)",
        )

    return judge


VIDEO = Study(
    name="video",
    method="both",
    title="Video: what a cell showed at a time",
    setting=(
        "Videos of 2 and 4 frames of 16 visual tokens, each frame behind its time in words; the question names a "
        f"time and a cell. The bases know this near (48 tokens) and are asked at {FAR:,}. Every method trains on all "
        "numbers of frames. PVM and LoRA: 240 short dense steps, blindfolded for PVM, and 80 on narrations of "
        "at most about 250 tokens; VisMem: 200 steps of warm start and 40 of stage I, memories of 32 latents. *Mixed "
        "up*: wrong, and what the asked cell shows in another frame. PVM's memory holds visual embeddings without "
        "positions or times; VisMem's long memory is formed from states, which hold both."
    ),
    cell=video_cell,
    rows=(
        TableRow("base", "base", {"method": "base"}),
        TableRow(
            "insert",
            "all visual embeddings again (training-free)",
            {"method": "insert", "content": "embeddings"},
        ),
        TableRow("pvm", LABELS["pvm"], training_of("pvm")),
        TableRow("long", LABELS["vismem"], training_of("vismem")),
        TableRow(
            "short",
            "VisMem, short (warm start + stage I)",
            {**training_of("vismem"), "plan": {**MEMORY, "kinds": ["short"]}, "kinds": ["short"]},
        ),
        TableRow("lora", LABELS["lora"], training_of("lora")),
    ),
    columns=(
        *(Column(f"moment_{n}", f"{n} frames") for n in FRAMES),
        *(Column(f"mixed_{n}", f"mixed up, {n} frames") for n in FRAMES),
        *(Column(f"moment_{n}_near", f"{n} frames, near") for n in FRAMES),
    ),
    claims=tuple(
        Claim(
            f"In long outputs {label} brings back what a cell of a video showed at a time, with 2 and with 4 frames.",
            "ours (the reader's question)",
            ("base", row),
            _keeps(row),
        )
        for row, label in (("pvm", "PVM"), ("long", "VisMem's long memory"), ("short", "VisMem's short memory"))
    ),
    settings={**READING, "base": BASE, "rows": 24, "config": {"num_long": 32, "num_short": 32}},
    seeds=(0, 1, 2),
    plot=Plot("bars", columns=tuple(f"moment_{n}" for n in FRAMES)),
)

STUDIES = (VIDEO,)
