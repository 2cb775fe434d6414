"""Cells of PVM's studies: train one method on narrations about one image, and read at several lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from keepsight.lab import evaluation
from keepsight.lab.experiments import Trained, TrainPlan, at_length, train
from keepsight.lab.pretraining import PretrainConfig, pretrain
from keepsight.lab.reference import load_reference
from keepsight.lab.study.study import Bench, Measured
from studies.pvm.refinement import RefinePlan, refine


def narration_base(bench: Bench, seed: int) -> tuple[Any, Any]:
    """The narration base of a seed, pretrained if it is not there yet: `(model, processor)`."""
    if seed == 0:
        return load_reference()  # the shipped one, which is what pretraining with seed 0 gives
    bench.report("pretraining a base", 0.0)
    return load_reference(bench.keep(f"bases/reference-{seed}", lambda out: pretrain(out, PretrainConfig(seed=seed))))


def plan_of(settings: dict[str, Any]) -> TrainPlan:
    """The training plan that a cell's settings describe."""
    plan: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.get("plan", {}).items()
    }
    return TrainPlan(**plan)


def by_length(model: Any, processor: Any, settings: dict[str, Any], seed: int, forward: Any = None) -> dict[str, float]:
    """Accuracy at every length of the settings, and their mean."""
    found: dict[str, float] = {}
    for length in settings["lengths"]:
        batches = evaluation.question_batches(processor, length, settings["rows"], seed, settings["split"])
        found[str(length)] = evaluation.accuracy(model, batches, forward).accuracy
    return {**found, "mean": sum(found.values()) / len(found)}


def train_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Train one method on the seed's base, and read at all lengths. `method: base` reads without training.

    Settings: `method`, `plan`, `lengths`, `rows`, `split`; and `target` (train at this length), `control`
    ("without_filler" or "squeezed", of the base), `refine` (GRPO after training), `strategy` (layers by the base's
    attention), `causal_at` (a length at which the memory is tampered with).
    """
    model, processor = narration_base(bench, seed)
    answers = settings["rows"] * evaluation.SCORED
    if settings["method"] == "base":
        control = settings.get("control")
        forward = (lambda batch: getattr(evaluation, control)(model, batch)) if control else None
        return Measured(by_length(model, processor, settings, seed, forward), answers)
    trained, plan = trained_by(bench, settings, model, processor, seed)
    facts: dict[str, Any] = {
        "parameters": trained.parameters,
        "training_accuracy": trained.final_accuracy,
        "gates": trained.gates,
        "training_seconds": round(trained.seconds, 1),
        "train_length": plan.train_length,
        "layers": list(plan.layers),
    }
    if "refine" in settings:
        facts |= refined(bench, settings, trained.model, processor, plan, seed)
    values = by_length(trained.model, processor, settings, seed)
    if "causal_at" in settings:
        batches = evaluation.question_batches(
            processor, settings["causal_at"], settings["rows"], seed, settings["split"]
        )
        battery = evaluation.causal_battery(trained.model, batches, seed)
        values |= {name: found.accuracy for name, found in battery.items()}
    return Measured(values, answers, facts)


def trained_by(
    bench: Bench, settings: dict[str, Any], model: Any, processor: Any, seed: int
) -> tuple[Trained, TrainPlan]:
    """Train a base as a cell's settings say, and the plan that this was."""
    plan = plan_of(settings)
    if "target" in settings:
        plan = at_length(plan, settings["target"], settings["target_steps"], settings["target_batch"])
    if "strategy" in settings:
        plan = replace(plan, layers=layers_by(settings["strategy"], model, processor, seed))
    progress = lambda done, total: bench.report("", done / total)  # noqa: E731
    return train(model, processor, settings["method"], plan, seed, progress), plan


def refined(
    bench: Bench, settings: dict[str, Any], model: Any, processor: Any, plan: TrainPlan, seed: int
) -> dict[str, float]:
    """GRPO on a trained model, as a cell's settings say; returns its facts."""
    refining = RefinePlan(**settings["refine"])
    return refine(model, processor, plan, refining, seed, lambda done, total: bench.report("GRPO", done / total))


def layers_by(strategy: str, model: Any, processor: Any, seed: int, count: int = 2) -> tuple[int, ...]:
    """The paper's two ways to choose layers by the base's own attention on the image (paper, layer ablation).

    Args:
        strategy: "peak": the `count` layers that look most at the image; "decay": those whose look falls most, from the
            first quarter of a narration of 512 tokens to the last (in bins of equal ratio).
    """
    mass = np.asarray(evaluation.attention_mass(model, processor, 512, 8, seed + 7000)["layers"])  # [L, P]
    quarter = mass.shape[1] // 4
    by = mass.mean(1) if strategy == "peak" else mass[:, :quarter].mean(1) - mass[:, -quarter:].mean(1)
    return tuple(sorted(np.argsort(-by)[:count].tolist()))
