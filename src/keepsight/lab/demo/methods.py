"""The demo as a study: one row per method, one cell each, which any process can run.

A cell loads the base from its checkpoint folder, works on one thread, reports its progress and returns plain data.
Cells share nothing, so their numbers do not depend on how many run at once; only the seconds do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keepsight.lab import evaluation
from keepsight.lab.demo.claims import CLAIMS
from keepsight.lab.digits import Split
from keepsight.lab.experiments import Trained, TrainPlan, at_length, train
from keepsight.lab.reference import build_model, load_reference
from keepsight.lab.study.study import Bench, Column, Measured, Study, TableRow

Report = Callable[[str, float], None]
"""Called as `report(what is being done, share done of the whole cell)`."""

LABELS = {
    "base": "base",
    "pvm": "PVM",
    "lora": "LoRA",
    "mlp": "parallel MLP",
    "pvm_plain": "PVM without warm-up",
    "lora_long": "LoRA, trained at full length",
}
BLINDFOLD_SHARE = 0.5
"""Of the demo's steps behind the warm-up; chosen on validation glyphs (LOG.md)."""


@dataclass(frozen=True)
class DemoSettings:
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
    def quick(cls, seed: int = 0, base: Path | None = None) -> DemoSettings:
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
    def rows_of_study(self) -> tuple[str, ...]:
        """The methods and the base, what takes longest first."""
        order = ("lora_long", "pvm", "pvm_plain", "lora", "mlp", "base")
        return tuple(name for name in order if name in (*self.methods, "base"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the seed stands apart."""
        found = {name: value for name, value in asdict(self).items() if name != "seed"}
        return found | {"base": None if self.base is None else str(self.base)}

    @classmethod
    def from_dict(cls, found: dict[str, Any], seed: int) -> DemoSettings:
        """What `as_dict` gave, also after JSON."""
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        plan: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found["plan"].items()}
        base = None if found["base"] is None else Path(found["base"])
        return cls(**{**found, **lists, "seed": seed, "plan": TrainPlan(**plan), "base": base})


def demo_study(settings: DemoSettings) -> Study:
    """The demo of these settings: its rows, and the claims that its one seed is to bear out."""
    return Study(
        name="demo",
        method="PVM",
        title="A small VLM loses its image in long outputs; a memory keeps it in view",
        setting="Digits read correctly, by generated tokens before the answer.",
        cell=demo_cell,
        rows=tuple(TableRow(name, LABELS[name], {"method": name}) for name in settings.rows_of_study),
        columns=tuple(Column(str(n), f"{n:,}") for n in settings.lengths),
        claims=CLAIMS,
        settings=settings.as_dict(),
        seeds=(settings.seed,),
    )


def demo_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """One row of the demo."""
    name = settings["method"]
    known = DemoSettings.from_dict({key: value for key, value in settings.items() if key != "method"}, seed)
    return as_measured(measure(name, known, bench.work, bench.report))


def as_measured(found: dict[str, Any]) -> Measured:
    """What `measure` found, as the outcome of a cell: the accuracies are its columns."""
    by_length = found["accuracy_by_length"]
    n = next(iter(by_length.values()))["n"]
    return Measured({length: entry["accuracy"] for length, entry in by_length.items()}, n, found)


def measure(name: str, settings: DemoSettings, folder: Path, report: Report) -> dict[str, Any]:
    """Measure the base, or train one method and measure it.

    Args:
        name: "base" or one of the methods.
        settings: what to do.
        folder: an adapter that is kept (PVM's) is saved to `folder / name`.
        report: receives progress.

    Returns:
        What was measured, ready for JSON.
    """
    return _base(settings, report) if name == "base" else _trained(name, settings, folder, report)


def _by_length(
    model: Any, processor: Any, settings: DemoSettings, report: Report, begin: float, share: float, forward: Any = None
) -> dict[str, dict[str, float | int]]:
    total, done, result = sum(settings.lengths), 0, {}
    for length in settings.lengths:
        batches = evaluation.question_batches(processor, length, settings.rows, settings.seed, settings.split)
        result[str(length)] = evaluation.accuracy(model, batches, forward).as_dict()
        done += length
        report(f"reading at {length:,} tokens", begin + share * done / total)
    return result


def _base(settings: DemoSettings, report: Report) -> dict[str, Any]:
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


def _trained(name: str, settings: DemoSettings, folder: Path, report: Report) -> dict[str, Any]:
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
        trained.model.save_pretrained(str(folder / name), save_embedding_layers=False)
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


def read_method(name: str, model: Any, processor: Any, settings: DemoSettings, report: Report) -> dict[str, Any]:
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
