"""The cost of runs: operations, tokens, time and memory, written beside results and put side by side.

Every training run writes `cost.json` into its output folder. A resumed run goes on counting; steps that a kill undid
were paid for and stay counted. `table` sets runs side by side, and sums of runs: what do two RL stages cost against
supervised fine-tuning?
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from keepsight.checkpoints.atomic import write_text
from keepsight.errors import KeepsightError
from keepsight.train.run.flops import ModelShape
from keepsight.words import duration

FILE = "cost.json"


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What a run cost, all processes together.

    Attributes:
        name: of the run.
        flops: floating-point operations, estimated from shapes (see `keepsight.train.run.flops`).
        tokens_trained: positions that a loss was computed on or through, images and prompts included, padding not.
        tokens_generated: tokens sampled in rollouts.
        seconds: wall time in the training loop, evaluation included.
        peak_memory: most bytes that one process held at a time: allocated on the GPU, or resident on a CPU.
        device: what `peak_memory` is about: "cuda" or "cpu".
        steps: optimiser steps taken, those that were taken twice because of a kill included.
        sessions: times the run was started or resumed.
        processes: of the last session.
        trained_parameters: of the last session.
    """

    name: str
    flops: float = 0.0
    tokens_trained: int = 0
    tokens_generated: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    device: str = "cpu"
    steps: int = 0
    sessions: int = 1
    processes: int = 1
    trained_parameters: int = 0

    def __add__(self, other: RunCost) -> RunCost:
        """Both, one after the other: sums, and the larger peak."""
        summed = ("flops", "tokens_trained", "tokens_generated", "seconds", "steps", "sessions")
        changes: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in summed}
        larger = max(self, other, key=lambda cost: cost.peak_memory)
        return replace(other, **changes, peak_memory=larger.peak_memory, device=larger.device)

    def write(self, folder: Path) -> None:
        """Write `cost.json` into `folder`, in one step."""
        write_text(folder / FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: str | Path) -> RunCost:
        """What the run in `folder` cost.

        Raises:
            FileNotFoundError: if there is no cost.json.
            KeepsightError: if it is none of ours.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}; every finished or interrupted training run writes one.")
        try:
            values = json.loads(file.read_text())
            return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
        except (ValueError, TypeError, KeyError) as error:
            raise KeepsightError(f"{file} does not hold what a run cost ({error}).") from error


def peak_memory() -> tuple[int, str]:
    """(bytes, device): the most that this process has held, on the GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated()), "cuda"
    if sys.platform == "win32":
        return 0, "cpu"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "cpu"


@dataclass
class CostMeter:
    """Counts while a run goes on. Each process counts its own work; `cost` takes the others to have done as much.

    Attributes:
        folder: gets cost.json at every `write`.
        name: of the run.
        shape: of the model being trained.
        trained_parameters: how many parameters are trained.
        resume: go on from the cost.json in `folder`.
        processes: how many of them train together.
    """

    folder: Path
    name: str
    shape: ModelShape
    trained_parameters: int = 0
    resume: bool = False
    processes: int = field(default_factory=lambda: int(os.environ.get("WORLD_SIZE", "1")))
    flops: float = 0.0
    tokens_trained: int = 0
    tokens_generated: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        there = self.resume and (self.folder / FILE).is_file()
        self._before = RunCost.read(self.folder) if there else None
        self._started = time.perf_counter()

    def trained(
        self,
        rows: int,
        length: int,
        *,
        tokens: int | None = None,
        patches: int = 0,
        checkpointing: bool = False,
        cached: int = 0,
    ) -> None:
        """Count a forward and backward over `rows` x `length` positions, of which `tokens` are no padding.

        Here and below, the first `cached` of a row's positions were read before, and are not counted.
        """
        self.flops += self.shape.train(rows, length, patches, checkpointing, cached)
        self.tokens_trained += rows * (length - cached) if tokens is None else int(tokens)

    def read(self, rows: int, length: int, *, patches: int = 0, cached: int = 0) -> None:
        """Count a forward without a backward: old log-probabilities, a reference model, an evaluation."""
        self.flops += self.shape.forward(rows, length, patches, cached)

    def generated(
        self, rows: int, prompt: int, new: int, *, tokens: int | None = None, patches: int = 0, cached: int = 0
    ) -> None:
        """Count a rollout of `rows` completions of up to `new` positions, of which `tokens` in all are no padding."""
        self.flops += self.shape.forward(rows, prompt + new, patches, cached)
        self.tokens_generated += rows * new if tokens is None else int(tokens)

    def add(self, flops: float) -> None:
        """Count anything else."""
        self.flops += flops

    @property
    def cost(self) -> RunCost:
        """The run so far, its earlier sessions included."""
        memory, device = peak_memory()
        session = RunCost(
            name=self.name,
            flops=self.flops * self.processes,
            tokens_trained=self.tokens_trained * self.processes,
            tokens_generated=self.tokens_generated * self.processes,
            seconds=time.perf_counter() - self._started,
            peak_memory=memory,
            device=device,
            steps=self.steps,
            processes=self.processes,
            trained_parameters=self.trained_parameters,
        )
        return session if self._before is None else self._before + session

    def write(self) -> RunCost:
        """Write the run's cost so far; only the first process does."""
        cost = self.cost
        if os.environ.get("RANK", "0") == "0":
            cost.write(self.folder)
        return cost


def read_costs(runs: Sequence[str | Path]) -> list[RunCost]:
    """The costs of runs and of sums of runs.

    Args:
        runs: folders; or "NAME=FOLDER+FOLDER" for the sum of several, such as "two RL stages=stage1+stage2".

    Raises:
        FileNotFoundError: if a folder has no cost.json.
    """
    costs = []
    for run in runs:
        label, named, rest = str(run).partition("=")
        if not named or (Path(run) / FILE).is_file():
            costs.append(RunCost.read(run))
            continue
        parts = [RunCost.read(part.strip()) for part in rest.split("+")]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        costs.append(replace(total, name=label.strip()))
    return costs


_HEADER = ("run", "PFLOP", "against the first", "tokens trained", "generated", "steps", "time", "peak memory")


def cost_rows(costs: Sequence[RunCost]) -> list[tuple[str, ...]]:
    """A row of words for each cost, under `_HEADER`."""
    first = costs[0].flops if costs else 0.0
    return [
        (
            cost.name,
            f"{cost.flops / 1e15:.4g}",
            f"{cost.flops / first:.2f} x" if first else "-",
            f"{cost.tokens_trained:,}",
            f"{cost.tokens_generated:,}",
            f"{cost.steps:,}",
            duration(cost.seconds),
            f"{cost.peak_memory / 2**30:.2f} GiB {cost.device}",
        )
        for cost in costs
    ]


def table(runs: Sequence[str | Path]) -> Any:
    """Runs side by side, as a `rich` table to print. Arguments as `read_costs`."""
    return as_table("What it cost", _HEADER, cost_rows(read_costs(runs)))


def markdown(runs: Sequence[str | Path]) -> str:
    """Runs side by side, as a markdown table. Arguments as `read_costs`."""
    return as_markdown(_HEADER, cost_rows(read_costs(runs)))


def as_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> Any:
    """Words and, right of them, numbers, as a `rich` table."""
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    for index, name in enumerate(head):
        result.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def as_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same in markdown."""
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
