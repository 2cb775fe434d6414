"""The demo's work in pieces: one job per method, each a function of plain settings, so that any process can do it.

A job loads the base from its checkpoint folder, works on one thread, reports its progress and returns plain data. Jobs
share nothing, so their numbers do not depend on how many run at once; only the seconds do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepsight.lab import evaluation
from keepsight.lab.digits import Split
from keepsight.lab.experiments import Trained, TrainPlan, at_length, train
from keepsight.lab.pretraining import one_thread
from keepsight.lab.reference import build_model, load_reference

Report = Callable[[str, float], None]
"""Called as `report(what is being done, share done of the whole job)`."""


BLINDFOLD_SHARE = 0.5
"""Of the demo's steps behind the warm-up; chosen on validation glyphs (LOG.md)."""


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on, besides the base.

    Attributes:
        seed: of adapters, training data and test images.
        plan: how adapters are trained.
        lengths: narration lengths in generated tokens at which accuracy is measured, rising.
        rows: test images per length.
        causal_lengths: lengths at which the memory is tampered with.
        mass_length, mass_rows: narrations over which visual attention mass is measured.
        long_steps, long_batch: training of `lora_long`, at the greatest of `lengths`.
        methods: which adapters to train.
        split: glyphs to measure on. Choices were made on "validation"; the demo reports "test".
        base: folder of the base, or None for the shipped one.
    """

    seed: int = 0
    plan: TrainPlan = field(default_factory=lambda: TrainPlan(blindfold_share=BLINDFOLD_SHARE))
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    rows: int = 64
    causal_lengths: tuple[int, ...] = (32, 1024)
    mass_length: int = 2048
    mass_rows: int = 8
    long_steps: int = 120
    long_batch: int = 8
    methods: tuple[str, ...] = ("pvm", "lora", "mlp", "pvm_plain", "lora_long")
    split: Split = "test"
    base: Path | None = None

    @classmethod
    def quick(cls, seed: int = 0, base: Path | None = None) -> Settings:
        """Fewer steps, fewer images, four times the training length at most, and no extra methods."""
        return cls(
            seed=seed,
            base=base,
            plan=TrainPlan(warmup_steps=100, steps=100, blindfold_share=BLINDFOLD_SHARE),
            lengths=(32, 128, 512, 1024, 2048),
            rows=32,
            mass_length=1024,
            mass_rows=4,
            methods=("pvm", "lora", "mlp"),
        )

    @property
    def jobs(self) -> tuple[str, ...]:
        """Names of all jobs, the longest first."""
        order = ("lora_long", "pvm", "pvm_plain", "lora", "mlp", "base")
        return tuple(name for name in order if name in (*self.methods, "base"))


def run_job(name: str, settings: Settings, workdir: Path, report: Report) -> dict[str, Any]:
    """Do one job.

    Args:
        name: "base" or one of the methods.
        settings: what to do.
        workdir: an adapter that is kept (PVM's) is saved to `workdir / name`.
        report: receives progress.

    Returns:
        What was measured, ready for JSON.
    """
    with one_thread():
        return _base_job(settings, report) if name == "base" else _method_job(name, settings, workdir, report)


def _by_length(
    model: Any, processor: Any, settings: Settings, report: Report, begin: float, share: float, forward: Any = None
) -> dict[str, dict[str, float | int]]:
    total, done, result = sum(settings.lengths), 0, {}
    for length in settings.lengths:
        batches = evaluation.question_batches(processor, length, settings.rows, settings.seed, settings.split)
        result[str(length)] = evaluation.accuracy(model, batches, forward).as_dict()
        done += length
        report(f"reading at {length:,} tokens", begin + share * done / total)
    return result


def _base_job(settings: Settings, report: Report) -> dict[str, Any]:
    model, processor = load_reference(settings.base)
    result: dict[str, Any] = {"trainable_parameters": 0, "training_seconds": 0.0}
    result["parameters"] = model.num_parameters()
    result["language_model_parameters"] = sum(p.numel() for p in model.model.language_model.layers.parameters())
    result["accuracy_by_length"] = _by_length(model, processor, settings, report, 0.0, 0.25)
    for key, control, begin in (
        ("masked_filler_accuracy_by_length", evaluation.without_filler, 0.25),
        ("squeezed_positions_accuracy_by_length", evaluation.squeezed, 0.5),
    ):
        result[key] = _by_length(
            model, processor, settings, report, begin, 0.25, lambda batch, c=control: c(model, batch)
        )
    mass = {}
    untrained = build_model(settings.seed, model.config.text_config.head_dim).eval()
    for step, (who, which) in enumerate((("base", model), ("untrained", untrained))):
        report("measuring attention mass", 0.75 + 0.12 * step)
        mass[who] = evaluation.attention_mass(which, processor, settings.mass_length, settings.mass_rows, settings.seed)
    result["visual_attention_mass"] = mass
    report("done", 1.0)
    return result


def _method_job(name: str, settings: Settings, workdir: Path, report: Report) -> dict[str, Any]:
    model, processor = load_reference(settings.base)
    plan = settings.plan
    if name == "lora_long":
        plan = at_length(plan, settings.lengths[-1], settings.long_steps, settings.long_batch)
    trained = train(
        model,
        processor,
        name,
        plan,
        settings.seed,
        lambda done, total: report(f"training {done}/{total}", 0.55 * done / total),
    )
    result = training_facts(trained, plan)
    result |= read_method(name, trained.model, processor, settings, report)
    if name == "pvm":
        trained.model.save_pretrained(str(workdir / name), save_embedding_layers=False)
    report("done", 1.0)
    return result


def training_facts(trained: Trained, plan: TrainPlan) -> dict[str, Any]:
    """What training says of itself."""
    return {
        "trainable_parameters": trained.parameters,
        "training_seconds": round(trained.seconds, 2),
        "train_length": plan.train_length,
        "training_accuracy": round(trained.final_accuracy, 4),
        "gates": trained.gates,
    }


def read_method(name: str, model: Any, processor: Any, settings: Settings, report: Report) -> dict[str, Any]:
    """What is measured of a trained method: accuracy by length, and for PVM what hangs on its memory."""
    result: dict[str, Any] = {}
    share = 0.3 if name == "pvm" else 0.45
    result["accuracy_by_length"] = _by_length(model, processor, settings, report, 0.55, share)
    if name == "pvm":
        result["causal_by_length"] = {}
        for step, length in enumerate(settings.causal_lengths):
            report(f"tampering with the memory at {length:,} tokens", 0.85 + 0.15 * step / len(settings.causal_lengths))
            batches = evaluation.question_batches(processor, length, settings.rows, settings.seed, settings.split)
            battery = evaluation.causal_battery(model, batches, settings.seed)
            result["causal_by_length"][str(length)] = {
                **{key: round(value.accuracy, 4) for key, value in battery.items()},
                "n": battery["on"].n,
            }
        result["causal"] = {
            **result["causal_by_length"][str(settings.causal_lengths[-1])],
            "length": settings.causal_lengths[-1],
        }
    return result
