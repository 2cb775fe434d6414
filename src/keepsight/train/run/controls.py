"""Controls of a memory: the same data, steps and seeds, without it.

    lora   a LoRA with as many parameters as the memory
    mlp    the paper's iso-parameter control: a parallel feed-forward branch of the memory's size that sees no image
    sft    the whole language model (by the same method: supervised, or by reinforcement)
    none   nothing is trained: the base as it is

Every control is a training run of its own in OUTPUT/control-NAME, resumable like any other; the comparison sets all of
them beside the memory, in `comparison.json` and `comparison.md`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from keepsight.checkpoints.atomic import write_text
from keepsight.data.check import CheckedData
from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.train.run.accounting import RunCost, as_markdown, as_table
from keepsight.train.run.learner import Learner, matched_lora
from keepsight.train.run.plan import MemoryPlan
from keepsight.words import duration

ControlName = Literal["lora", "mlp", "sft", "none"]
SFT_LR_SHARE = 0.1
"""The whole language model learns at this share of the memory's rate, where no other is given."""

WHAT = {
    "lora": "LoRA of the memory's size",
    "mlp": "a branch of its size that sees no image",
    "sft": "the whole language model",
    "none": "the base, untrained",
}
"""What a control trains, in words."""

_ONE_IN = 10  # samples held out where no evaluation data are given
_MOST = 512


@dataclass(frozen=True)
class Control:
    """A control that was asked for.

    Attributes:
        name: which one.
        lr: its peak learning rate; None for the default.
    """

    name: ControlName
    lr: float | None = None

    def rate(self, lr: float, whole_model_too: bool = False) -> float:
        """Its learning rate beside a memory that learns at `lr` (`whole_model_too`: with its language model)."""
        if self.lr is not None:
            return self.lr
        return lr * SFT_LR_SHARE if self.name == "sft" and not whole_model_too else lr


def parse_controls(texts: Sequence[str]) -> tuple[Control, ...]:
    """Controls as written on the command line.

    Args:
        texts: names, also several with commas between them, each with "=RATE" behind it for a learning rate of its
            own: ["lora,mlp", "sft=1e-5"]. "none" is the untrained base.

    Raises:
        KeepsightError: naming what is no control.
    """
    found: dict[str, Control] = {}
    for text in (part.strip() for one in texts for part in one.split(",")):
        if not text:
            continue
        name, given, number = text.partition("=")
        if name not in get_args(ControlName):
            raise KeepsightError(
                f"--control {text}: expected lora, mlp, sft or none, several with commas between them, and a learning "
                "rate behind a name if it is to have its own: --control lora,mlp,sft=1e-5."
            )
        try:
            lr = float(number) if given else None
        except ValueError:
            lr = math.nan
        if lr is not None and not (lr > 0 and math.isfinite(lr)):
            raise KeepsightError(f"--control {text}: {number!r} is no learning rate; write {name}=1e-5.")
        if name == "none" and lr is not None:
            raise KeepsightError("--control none trains nothing, so a learning rate has no effect; write none alone.")
        if name in found:
            raise KeepsightError(f"--control names {name} twice.")
        found[name] = Control(name, lr)  # type: ignore[arg-type]
    return tuple(found.values())


def control_learner(control: Control, memory: Learner, plan: MemoryPlan) -> Learner:
    """What a control trains in place of a memory (and of the policy that is trained with it).

    Args:
        control: which one.
        memory: what the run itself trains.
        plan: the run's base and memory.
    """
    if control.name == "none":
        return Learner()
    if control.name == "sft":
        return Learner(policy="full")
    if control.name == "lora":
        lora, _ = matched_lora(plan.backbone, plan.memory_parameters)
        return Learner(policy="lora", lora=lora)
    config = plan.pvm
    branch = PvmConfig(layers=config.layers, width=config.width, ffn_width=config.ffn_width, branch="mlp")
    return replace(memory, memory=branch, memory_from=None)


def control_folder(folder: Path, control: Control) -> Path:
    """Where a control's run goes."""
    return folder / f"control-{control.name}"


def hold_out(data: CheckedData) -> tuple[CheckedData, CheckedData | None]:
    """(for training, held out): every tenth sample, evenly spaced, at most 512; None held out if there are too few."""
    size = min(data.rows // _ONE_IN, _MOST)
    if size == 0:
        return data, None
    every = data.rows / size
    chosen = {int(index * every + every / 2) for index in range(size)}
    rest = [index for index in range(data.rows) if index not in chosen]
    return (
        replace(data.select(rest), skipped=data.skipped, lengths=data.lengths, cut=data.cut),
        data.select(sorted(chosen)),
    )


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        name: "pvm", "lora", ...
        what: what was trained, in words.
        folder: of the run; None where nothing was saved.
        parameters: trained.
        lr: peak learning rate; None where nothing was trained.
        steps: optimiser steps.
        first_loss, last_loss: of training.
        first_reward, last_reward: of training by reinforcement.
        metrics: evaluation after the last step, on the same samples for all.
        cost: of the run.
    """

    name: str
    what: str
    folder: Path | None = None
    parameters: int = 0
    lr: float | None = None
    steps: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_reward: float | None = None
    last_reward: float | None = None
    metrics: dict[str, float] | None = None
    cost: RunCost | None = None

    @classmethod
    def of(cls, name: str, what: str, report: Any, lr: float | None) -> Outcome:
        """The outcome that a `TrainReport` tells of."""
        taken = ("steps", "first_loss", "last_loss", "first_reward", "last_reward", "metrics", "cost")
        values = {key: getattr(report, key) for key in taken}
        return cls(name, what, report.output_dir, report.trainable, lr if report.steps else None, **values)


@dataclass(frozen=True)
class Comparison:
    """A memory beside its controls.

    Attributes:
        outcomes: the memory first.
        note: what a reader must know of it: what was evaluated, what differs.
    """

    outcomes: tuple[Outcome, ...]
    note: str

    def columns(self) -> list[str]:
        """Heads of the table."""
        return ["", "trained parameters", "learning rate", *self._told(), *self._metrics(), "steps", "PFLOP", "time"]

    def rows(self) -> list[list[str]]:
        """Cells of the table, a row for each outcome."""
        return [
            [
                f"{one.name}: {one.what}",
                f"{one.parameters:,}",
                "-" if one.lr is None else f"{one.lr:g}",
                *(_from_to(one, name) for name in self._told()),
                *(_number((one.metrics or {}).get(name)) for name in self._metrics()),
                f"{one.steps:,}",
                "-" if one.cost is None else f"{one.cost.flops / 1e15:.4g}",
                "-" if one.cost is None else duration(one.cost.seconds),
            ]
            for one in self.outcomes
        ]

    def _told(self) -> list[str]:
        names = ("loss", "reward")
        return [name for name in names if any(getattr(one, f"last_{name}") is not None for one in self.outcomes)]

    def _metrics(self) -> list[str]:
        wanted = ("eval_loss", "eval_mean_token_accuracy", "eval_reward")
        found = [name for one in self.outcomes for name in one.metrics or {}]
        rewards = sorted({n for n in found if n.startswith("eval_rewards/") and n.endswith("/mean")})
        chosen = [*(name for name in wanted if name in found), *rewards]
        return [name for name in chosen if not (name == "eval_loss" and "eval_reward" in found)]

    def markdown(self) -> str:
        """The table, with what must be known of it."""
        return f"{as_markdown(self.columns(), self.rows())}\n{self.note}\n"

    def table(self) -> Any:
        """The table for a terminal."""
        return as_table("Beside its controls", self.columns(), self.rows(), self.note)

    def write(self, folder: Path) -> None:
        """Write comparison.json and comparison.md into `folder`, each in one step."""
        outcomes = []
        for one in self.outcomes:
            inside = one.folder is not None and one.folder.is_relative_to(folder)
            where = one.folder.relative_to(folder).as_posix() if inside and one.folder is not None else None
            values = {name: value for name, value in vars(one).items() if name not in ("folder", "cost")}
            outcomes.append({**values, "folder": where, "cost": None if one.cost is None else vars(one.cost)})
        write_text(folder / "comparison.json", json.dumps({"note": self.note, "outcomes": outcomes}, indent=2) + "\n")
        write_text(folder / "comparison.md", self.markdown())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _from_to(one: Outcome, name: str) -> str:
    first, last = getattr(one, f"first_{name}"), getattr(one, f"last_{name}")
    return "-" if last is None else f"{_number(first)} to {_number(last)}"
