"""PVM's questions to the lab, on narrations about one image (`keepsight.lab.narration`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from keepsight.lab import evaluation
from keepsight.lab.experiments import TrainPlan, at_length, train
from keepsight.lab.pretraining import PretrainConfig, pretrain
from keepsight.lab.reference import load_reference
from keepsight.lab.study import Bench, Column, Outcome, Row, Study


TUNING_SEED = 100
"""The base on which learning rates are chosen; no result comes from it."""
LENGTHS = (32, 128, 512, 1024, 2048)
FAR = "2048"
TRAINING = {"warmup_steps": 120, "steps": 160, "batch": 8}
ROWS = 40


def narration_base(bench: Bench, seed: int) -> tuple[Any, Any]:
    """The narration base of a seed, pretrained if it is not there yet: `(model, processor)`."""
    if seed == 0:
        return load_reference()  # the shipped one, which is what pretraining with seed 0 gives
    bench.report("pretraining a base", 0.0)
    return load_reference(bench.keep(f"bases/reference-{seed}", lambda out: pretrain(out, PretrainConfig(seed=seed))))


def plan_of(settings: dict[str, Any]) -> TrainPlan:
    """The training plan that a cell's settings describe."""
    plan = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.get("plan", {}).items()}
    return TrainPlan(**plan)


def by_length(model: Any, processor: Any, settings: dict[str, Any], seed: int, forward: Any = None) -> dict[str, float]:
    """Accuracy at every length of the settings."""
    found = {}
    for length in settings["lengths"]:
        batches = evaluation.question_batches(processor, length, settings["rows"], seed, settings["split"])
        found[str(length)] = evaluation.accuracy(model, batches, forward).accuracy
    return found


def train_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Outcome:
    """Train one method on the seed's base, and read at all lengths. `method: base` reads without training.

    Settings: `method`, `plan`, `lengths`, `rows`, `split`; and `target` (train at this length), `control`
    ("without_filler" or "squeezed", of the base), `strategy` (layers by the base's attention), `causal_at` (a length
    at which the memory is tampered with).
    """
    model, processor = narration_base(bench, seed)
    answers = settings["rows"] * evaluation.SCORED
    if settings["method"] == "base":
        control = settings.get("control")
        forward = (lambda batch: getattr(evaluation, control)(model, batch)) if control else None
        return Outcome(by_length(model, processor, settings, seed, forward), answers)
    plan = plan_of(settings)
    if "target" in settings:
        plan = at_length(plan, settings["target"], settings["target_steps"], settings["target_batch"])
    if "strategy" in settings:
        plan = replace(plan, layers=layers_by(settings["strategy"], model, processor, seed))
    trained = train(
        model, processor, settings["method"], plan, seed, lambda done, total: bench.report("", done / total)
    )
    facts: dict[str, Any] = {
        "parameters": trained.parameters,
        "training_accuracy": trained.final_accuracy,
        "gates": trained.gates,
        "training_seconds": round(trained.seconds, 1),
        "train_length": plan.train_length,
        "layers": list(plan.layers),
    }
    values = by_length(trained.model, processor, settings, seed)
    if "causal_at" in settings:
        batches = evaluation.question_batches(
            processor, settings["causal_at"], settings["rows"], seed, settings["split"]
        )
        battery = evaluation.causal_battery(trained.model, batches, seed)
        values |= {name: found.accuracy for name, found in battery.items()}
    return Outcome(values, answers, facts)


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


def length_columns(lengths: tuple[int, ...] = LENGTHS) -> tuple[Column, ...]:
    """One column per length."""
    return tuple(Column(str(n), f"{n:,}") for n in lengths)


# --- tuning -----------------------------------------------------------------------------------------------------------

TRIES: dict[str, tuple[str, tuple[float, ...]]] = {
    "pvm": ("pvm_lr", (3e-3, 6e-3, 1.2e-2, 2.4e-2)),
    "pvm_plain": ("pvm_lr", (3e-3, 6e-3, 1.2e-2, 2.4e-2)),
    "mlp": ("mlp_lr", (7.5e-4, 1.5e-3, 3e-3, 6e-3)),
    "lora": ("lora_lr", (3e-5, 1e-4, 3e-4, 1e-3)),
    "sft": ("sft_lr", (1e-5, 3e-5, 1e-4, 3e-4)),
    "lora_long": ("long_lr", (3e-4, 1e-3, 3e-3, 1e-2)),
}
"""Method -> the learning rate that is tuned, and its four tries."""
METHOD_LABELS = {
    "pvm": "PVM with blindfold warm-up (ours)",
    "pvm_plain": "PVM, plain SFT (the paper's stage 1)",
    "lora": "LoRA",
    "mlp": "parallel MLP",
    "sft": "SFT (full fine-tuning)",
    "lora_long": "LoRA trained at target length",
}
LONG = {"target": 2048, "target_steps": 80, "target_batch": 6}


def tuning_row(method: str, lr: float) -> Row:
    """One try."""
    name, _ = TRIES[method]
    settings: dict[str, Any] = {"method": method, "plan": {**TRAINING, name: lr}}
    if method == "lora_long":
        settings |= LONG
    return Row(f"{method}@{lr:g}", f"{METHOD_LABELS[method]}, {lr:g}", settings)


TUNING = Study(
    name="pvm-tuning",
    method="PVM",
    title="Equal effort of tuning",
    setting=(
        "Every method gets four learning rates, on one base of its own (seed 100, which no result uses) and on "
        "*validation* glyphs. The figure of merit is the accuracy averaged over all lengths, so controls that "
        "extrapolate are preferred to controls that fit; the winner is what all other studies use. Everything else "
        "(data, steps, batches) is shared."
    ),
    cell=train_cell,
    rows=tuple(tuning_row(method, lr) for method, (_, rates) in TRIES.items() for lr in rates),
    columns=length_columns((32, 256, 1024, 2048)),
    settings={"lengths": [32, 256, 1024, 2048], "rows": 32, "split": "validation"},
    seeds=(TUNING_SEED,),
)

STUDIES = (TUNING,)
