"""A stage of training that can be stopped at any time and goes on where it was."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keepsight.errors import KeepsightError
from studies.eye.making.muon import Muon

_SAVE_EVERY = 120.0
"""Seconds between checkpoints."""
_DECAY = 0.03
_STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon keep of a parameter."""


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
    """Steps over parameters, with AdamW, or Muon where asked for, a cosine rate and a checkpoint.

    Args:
        name: of the stage, and of its file.
        folder: of the checkpoint.
        parameters: what is trained, by name; each with its share of the learning rate.
        steps: of the whole stage.
        lr: highest learning rate.
        settings: what a checkpoint must have been made with to go on from it.
        muon: names of matrices that Muon trains.
        muon_lr: its highest learning rate.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        parameters: Mapping[str, tuple[torch.nn.Parameter, float]],
        steps: int,
        lr: float,
        settings: dict[str, Any],
        muon: Collection[str] = (),
        muon_lr: float = 0.0,
    ):
        self.name, self.steps = name, steps
        self.file = folder / f"{name}.safetensors"
        self.parameters = {key: parameter for key, (parameter, _) in parameters.items()}
        self.settings = json.loads(json.dumps(settings))
        others = [key for key in self.parameters if key not in muon]
        groups = [{"params": [self.parameters[key]], "highest": lr * parameters[key][1]} for key in others]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=_DECAY)
        ]
        if muon:
            groups = [{"params": [self.parameters[key]], "highest": muon_lr * parameters[key][1]} for key in muon]
            self.optimizers.append(Muon(groups, lr=muon_lr, weight_decay=_DECAY))
        self.optimizer_of = {key: self.optimizers[key in muon] for key in self.parameters}
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
            rate = min(1.0, (self.step + 1) / (0.08 * self.steps + 1)) * (0.5 + 0.5 * math.cos(math.pi * share))
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["highest"]
            loss = loss_of(next(batches))
            if not torch.isfinite(loss):
                raise KeepsightError(
                    f"{self.name}: the loss is {loss.item()} at step {self.step}; the checkpoint is kept."
                )
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
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
            state = {} if self.done else self.optimizer_of[key].state.get(parameter, {})  # of no more use then
            for name, value in state.items():
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
                state = {name: opened.get_tensor(f"{name}.{key}") for name in _STATE if f"{name}.{key}" in held}
                if state:
                    self.optimizer_of[key].state[parameter] = {
                        name: value if name == "step" else value.to(parameter.device) for name, value in state.items()
                    }
