"""A stage of training that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keepsight.errors import KeepsightError

_SAVE_EVERY = 120.0
"""Seconds between checkpoints."""


def generator(*seeds: int) -> torch.Generator:
    """Randomness that depends on these numbers alone, so that a step draws the same after a stop."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


class _Drawn(torch.utils.data.Dataset[Any]):
    def __init__(self, batch_of: Callable[[int], Any]):
        self.batch_of = batch_of

    def __getitem__(self, step: int) -> Any:
        return self.batch_of(step)


def _batches(batch_of: Callable[[int], Any], steps: range, workers: int) -> Iterable[Any]:
    if not workers:
        return map(batch_of, steps)
    # forked: a worker shares the drawings' memory, and touches no GPU
    drawn = _Drawn(batch_of)
    return torch.utils.data.DataLoader(
        drawn, batch_size=None, sampler=steps, num_workers=workers, multiprocessing_context="fork"
    )


class Stage:
    """Steps over parameters, with AdamW, a cosine rate and a checkpoint.

    Args:
        name: of the stage, and of its file.
        folder: of the checkpoint.
        parameters: what is trained, by name; each with its share of the learning rate.
        steps: of the whole stage.
        lr: highest learning rate.
        settings: what a checkpoint must have been made with to go on from it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        parameters: Mapping[str, tuple[torch.nn.Parameter, float]],
        steps: int,
        lr: float,
        settings: dict[str, Any],
    ):
        self.name, self.steps, self.lr = name, steps, lr
        self.file = folder / f"{name}.safetensors"
        self.parameters = {key: parameter for key, (parameter, _) in parameters.items()}
        self.shares = [share for _, share in parameters.values()]
        self.settings = json.loads(json.dumps(settings))
        groups = [{"params": [parameter]} for parameter in self.parameters.values()]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.03)
        self.step, self.cpu_seconds, self.losses = 0, 0.0, list[float]()
        self._load()

    @property
    def done(self) -> bool:
        """All steps have been made."""
        return self.step >= self.steps

    def run(
        self,
        batch_of: Callable[[int], Any],
        loss_of: Callable[[Any], torch.Tensor],
        stop: Callable[[], bool],
        on_progress: Callable[[str, int, int, float], Any] = lambda *_: None,
        workers: int = 0,
    ) -> None:
        """Make steps until all are made or `stop()` says so; then save.

        Args:
            batch_of: draws the batch of a step, from its number alone.
            loss_of: of a batch.
            stop: asked before every step.
            on_progress: called with name, step, steps and the mean loss of the last steps.
            workers: processes that draw batches ahead; 0 draws them here.

        Raises:
            KeepsightError: the loss is no number.
        """
        begin, saved = time.process_time(), time.monotonic()
        batches = iter(_batches(batch_of, range(self.step, self.steps), workers))
        while not self.done and not stop():
            share = self.step / self.steps
            rate = (
                self.lr * min(1.0, (self.step + 1) / (0.08 * self.steps + 1)) * (0.5 + 0.5 * math.cos(math.pi * share))
            )
            for group, of in zip(self.optimizer.param_groups, self.shares, strict=True):
                group["lr"] = rate * of
            loss = loss_of(next(batches))
            if not torch.isfinite(loss):
                raise KeepsightError(
                    f"{self.name}: the loss is {loss.item()} at step {self.step}; the checkpoint is kept."
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.losses.append(round(loss.item(), 4))
            on_progress(self.name, self.step, self.steps, sum(self.losses[-50:]) / len(self.losses[-50:]))
            if time.monotonic() - saved > _SAVE_EVERY:
                self.cpu_seconds += time.process_time() - begin
                begin, saved = time.process_time(), time.monotonic()
                self.save()
        self.cpu_seconds += time.process_time() - begin
        self.save()

    def save(self) -> None:
        """Write weights, Adam's moments and the step, whole or not at all."""
        tensors = {f"weight.{key}": parameter.detach().contiguous() for key, parameter in self.parameters.items()}
        for key, parameter in self.parameters.items():
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value.detach().contiguous().float()
        about = {
            "settings": json.dumps(self.settings),
            "step": str(self.step),
            "cpu_seconds": str(self.cpu_seconds),
            "losses": json.dumps(self.losses[:: max(1, len(self.losses) // 2000)]),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        save_file({key: value.clone().cpu() for key, value in tensors.items()}, part, about)
        os.replace(part, self.file)

    def _load(self) -> None:
        if not self.file.is_file():
            return
        with safe_open(self.file, "pt") as opened:
            about = opened.metadata()
            there = json.loads(about["settings"])
            other = sorted(key for key in {*there, *self.settings} if there.get(key) != self.settings.get(key))
            if other:
                raise KeepsightError(
                    f"{self.file} was made with other settings ({', '.join(other)}). Remove it, or take another folder."
                )
            self.step, self.cpu_seconds = int(about["step"]), float(about["cpu_seconds"])
            self.losses = json.loads(about["losses"])
            held = set(opened.keys())
            for key, parameter in self.parameters.items():
                parameter.data.copy_(opened.get_tensor(f"weight.{key}"))
                if f"exp_avg.{key}" in held:
                    self.optimizer.state[parameter] = {
                        "step": opened.get_tensor(f"step.{key}"),
                        "exp_avg": opened.get_tensor(f"exp_avg.{key}").to(parameter.device),
                        "exp_avg_sq": opened.get_tensor(f"exp_avg_sq.{key}").to(parameter.device),
                    }
