"""Cells of the studies on further tasks: train one method on some tasks, then ask at a length where the base fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.experiments import attach, fit
from keepsight.lab.reference import load_reference
from keepsight.lab.study.study import Bench, Measured
from studies.pvm.cells import plan_of
from studies.tasks.pretraining import TaskPretrainConfig, pretrain_tasks, questions, short_facts
from studies.tasks.tasks import ID, TaskBatch, make_batch
from studies.vismem.cells import plan_of as memory_plan_of
from studies.vismem.cells import share_of
from studies.vismem.reading import attach_vismem, lab_config
from studies.vismem.tasks import answers_with_memory, train_memory

UNTRAINED = ("base", "insert")
"""Methods without training: nothing, and something put into the text again."""


def task_base(bench: Bench, config: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """The base of a seed that knows the tasks of `config`, pretrained if it is not there: `(model, processor)`."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return load_reference(_base_folder(bench, TaskPretrainConfig(**{"seed": seed, **given})))


def _base_folder(bench: Bench, plan: TaskPretrainConfig) -> Path:
    start = _base_folder(bench, TaskPretrainConfig(seed=plan.seed, tasks=plan.begin)) if plan.begin else None
    bench.report("pretraining a base for these tasks", 0.0)
    return bench.keep(f"bases/{plan.name}", lambda out: pretrain_tasks(out, plan, start=start))


def fitted(
    bench: Bench, settings: dict[str, Any], seed: int, model: Any, processor: Any, tasks: Sequence[str], stage: int = 0
) -> tuple[Any, dict[str, Any]]:
    """Train the settings' method on some tasks: the base first, or what an earlier stage made of it.

    Settings: `method` ("pvm", "lora", "sft", "vismem", or one of `UNTRAINED`), `plan` (of `TrainPlan`, or of
    `TrainingPlan` for VisMem; `plan_later` changes it from the second stage on), `config` (of VisMem).

    Returns:
        `(model, facts about the training)`.
    """
    method = settings["method"]
    if method in ("vismem", "insert") and not stage:
        model = attach_vismem(model, processor, seed, lab_config(**settings.get("config", {})))
    if method in UNTRAINED:
        return model, {}
    given = {**settings["plan"], **(settings.get("plan_later", {}) if stage else {})}
    progress = share_of(bench, "training", 0.0, 0.8)
    if method == "vismem":
        return model, train_memory(
            model, processor, memory_plan_of({"plan": given}), tasks, seed + 1000 * stage, progress
        )
    plan = plan_of({"plan": given})
    if not stage:
        model = attach(model, method, plan, seed)

    def batch(step: int, rng: np.random.Generator) -> Any:
        shape = (96, 0) if step < plan.warmup_steps else (settings["train_tokens"], plan.max_gap)
        return make_batch(processor, short_facts(rng, tasks, *shape), plan.batch, "train", rng)

    trained = fit(model, method, plan, seed + 1000 * stage, batch, progress)
    return model, {"parameters": trained.parameters, "training_accuracy": trained.final_accuracy}


@torch.no_grad()
def at(model: Any, processor: Any, settings: dict[str, Any], task: str, length: int, seed: int) -> float:
    """Accuracy on one task at one length. Settings: `rows`, `split`; with VisMem `kinds` and `content` of memories."""
    right = []
    for batch in questions(processor, task, length, settings["rows"], seed, settings["split"]):
        right.append(answers(model, batch, settings) == batch.truth())
    return torch.cat(right).float().mean().item()


@torch.no_grad()
def answers(model: Any, batch: TaskBatch, settings: dict[str, Any]) -> torch.Tensor:
    """The most probable tokens [B, A] at all answers of a batch. Settings as for `at`."""
    if settings["method"] in ("vismem", "insert"):
        return answers_with_memory(model, batch, settings.get("kinds", ["long"]), settings.get("content", "own"))
    return model(**batch.model_inputs(), use_cache=False).logits[:, batch.answers - 1].argmax(-1)


def cross_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Train on some tasks, ask all, near and far. Settings: as `fitted` and `at`, `train_on`, `ask`, `near`, `far`."""
    model, processor = task_base(bench, settings["base"], seed)
    model, facts = fitted(bench, settings, seed, model, processor, settings.get("train_on", ()))
    values = {}
    for task in settings["ask"]:
        bench.report(f"asking {task}", 0.9)
        values[task] = at(model, processor, settings, task, settings["far"], seed)
        values[f"{task}_near"] = at(model, processor, settings, task, settings["near"], seed)
    for name, group in settings.get("groups", {}).items():
        values[name] = float(np.mean([values[task] for task in group]))
    values["near"] = float(np.mean([values[f"{task}_near"] for task in settings["ask"]]))
    return Measured(values, settings["rows"] * 4, facts)


def continual_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Train on stages, one after the other, and after each ask the first stage's task and its own.

    Settings: as `fitted` and `at`, `stages`, `far`; what is to keep a memory from overwriting, from the second stage
    on: `replay` (narrations of the earlier stages' tasks among the new one's), `frozen` (parts of parameters' names
    that learn no more), `kept` (share of every stage's change that is taken back behind it), `own` (parts of
    parameters' names that alone learn then, and of which every task keeps its own, taken where it is asked).

    Values:
        `first_<n>`, `own_<n>`: the first stage's task and its own, behind stage n; `forgotten`; `taken`: behind a stage
        on `colour`, the share of answers to `read` that tell the cell's colour.
    """
    model, processor = task_base(bench, settings["base"], seed)
    first, values = settings["stages"][0], {}
    own, of_first = settings.get("own"), dict[str, torch.Tensor]()
    for stage, task in enumerate(settings["stages"]):
        tasks = settings["stages"][: stage + 1] if settings.get("replay") else [task]
        before = {name: p.detach().clone() for name, p in model.named_parameters() if stage and p.requires_grad}
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.requires_grad_(_learns(name, settings))
        model, _ = fitted(bench, settings, seed, model, processor, tasks, stage)
        take_back(model, before, settings.get("kept", 0.0))
        values[f"own_{stage + 1}"] = at(model, processor, settings, task, settings["far"], seed)
        if not stage:
            values["first_1"] = values["own_1"]
            of_first = {name: p.detach().clone() for name, p in model.named_parameters() if own and p.requires_grad}
            continue
        of_this = {name: p.detach().clone() for name, p in model.named_parameters() if name in of_first}
        take_back(model, of_first, 1.0)
        if (first, task) == ("read", "colour"):
            values["taken"] = taken_for_colours(model, processor, settings, seed)
        values[f"first_{stage + 1}"] = at(model, processor, settings, first, settings["far"], seed)
        take_back(model, of_this, 1.0)
    values["forgotten"] = values["first_1"] - values[f"first_{len(settings['stages'])}"]
    return Measured(values, settings["rows"] * 4)


def _learns(name: str, settings: dict[str, Any]) -> bool:
    """Whether a parameter of a memory learns after the first stage."""

    def has(parts: list[str]) -> bool:
        return any(f".{part}." in f"{name}." for part in parts)

    return has(settings["own"]) if settings.get("own") else not has(settings.get("frozen", []))


def taken_for_colours(model: Any, processor: Any, settings: dict[str, Any], seed: int) -> float:
    """Of the answers to `read`, the share that tells the asked cell's colour: the right cell, the wrong question."""
    taken = []
    for batch in questions(processor, "read", settings["far"], settings["rows"], seed, settings["split"]):
        cells = batch.input_ids[:, batch.answers - 1] - ID[CELLS[0]]  # [B, A]
        colours = torch.from_numpy(batch.scene.colours[:, 0]).gather(1, cells) + ID["red"]
        taken.append(answers(model, batch, settings) == colours)
    return torch.cat(taken).float().mean().item()


@torch.no_grad()
def take_back(model: Any, before: dict[str, torch.Tensor], share: float) -> None:
    """Move parameters back towards what they were `before`, by a share of the way."""
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.lerp_(before[name], share)
