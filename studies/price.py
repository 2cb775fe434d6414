"""What an operation of training buys: floating-point operations counted while a sample of each recipe's steps runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from keepsight.lab.experiments import at_length, train
from keepsight.lab.study.results import Interval, Judgement, Results, interval, judged
from keepsight.lab.study.study import Bench, Claim, Column, Measured, Study, TableRow
from studies.pvm.cells import narration_base, plan_of
from studies.pvm.refinement import RefinePlan, refine
from studies.pvm.studies import METHOD_LABELS, training_of
from studies.vismem.reading import attach_vismem, lab_config
from studies.vismem.training import TrainingPlan, stage_one, warm_start

FAR = "1024"
SAMPLE = 20
"""One of so many steps is counted."""


def price_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Operations of one recipe.

    Settings: `part`: "warm", "stage_one", "train" (`method`, `plan`, `target`) or "refine".

    Values: `operations`, in units of 10^12: those of a sample of the steps, times what share of all steps it is.
    """
    model, processor = narration_base(bench, seed)
    part = settings["part"]
    if part in ("warm", "stage_one"):
        plan = TrainingPlan()
        model = attach_vismem(model, processor, seed, lab_config())
        with FlopCounterMode(display=False) as counter:
            if part == "warm":
                warm_start(model, processor, replace(plan, warm_steps=plan.warm_steps // SAMPLE), seed)
            else:
                stage_one(model, processor, replace(plan, steps=plan.steps // SAMPLE), seed)
    else:
        plan_ = plan_of(settings)
        if "target" in settings:
            plan_ = at_length(plan_, settings["target"], settings["target_steps"], settings["target_batch"])
        plan_ = replace(plan_, warmup_steps=plan_.warmup_steps // SAMPLE, steps=plan_.steps // SAMPLE)
        with FlopCounterMode(display=False) as counter:
            trained = train(model, processor, settings["method"], plan_, seed)
        if part == "refine":
            with FlopCounterMode(display=False) as counter:
                refine(trained.model, processor, plan_, RefinePlan(steps=RefinePlan().steps // SAMPLE), seed)
    return Measured({"operations": counter.get_total_flops() * SAMPLE / 1e12})


def _bought(results: Results, row: str, over: str, *parts: str) -> Interval:
    """Points at 1,024 tokens for 10^12 operations, by seed; operations are a count, and seeds share it."""
    mine, theirs = results.values(row, FAR), results.values(over, FAR)
    price = sum(results.at(part, "operations").mean for part in parts)
    return interval([(mine[seed] - theirs[seed]) / price for seed in sorted(mine.keys() & theirs.keys())])


def _per_operation(results: Results) -> Judgement:
    stage = _bought(results, "long", "warm_long", "price_stage_one")
    others = {
        "the warm start": _bought(results, "warm_long", "base", "price_warm"),
        "both together": _bought(results, "long", "base", "price_warm", "price_stage_one"),
        METHOD_LABELS["lora_long"]: _bought(results, "lora_long", "base", "price_lora_long"),
        METHOD_LABELS["sft_long"]: _bought(results, "sft_long", "base", "price_sft_long"),
        METHOD_LABELS["pvm"]: _bought(results, "pvm", "base", "price_pvm"),
        "GRPO behind it": _bought(results, "pvm_grpo", "pvm", "price_refine"),
    }
    words = ", ".join(f"{name} {found.points()}" for name, found in others.items())
    return judged(
        stage.low > others[METHOD_LABELS["lora_long"]].high,
        f"Gained at 1,024 tokens for 10^12 operations: VisMem's stage I on top of the warm start {stage.points()}; "
        f"{words}. (Holds if stage I's interval lies above that of LoRA.)",
    )


def _counted(part: str, label: str) -> TableRow:
    return TableRow(f"price_{part}", label, {"part": part}, seeds=(0,))


def _trained(method: str, part: str = "train", label: str = "") -> TableRow:
    name = "refine" if part == "refine" else method
    return TableRow(f"price_{name}", label or METHOD_LABELS[method], {"part": part, **training_of(method)}, seeds=(0,))


PRICE = Study(
    name="price",
    method="both",
    title="What an operation of training buys",
    setting=(
        "Floating-point operations of whole recipes, in units of 10^12, counted by torch while a twentieth of their "
        "steps runs (draws, backward passes and lengths as they come; of stage I that is six steps); and what the same "
        "recipes gain at 1,024 tokens, from `pvm-length`, `pvm-grpo` and `vismem-memory`. By the clock: "
        "`vismem-memory`."
    ),
    cell=price_cell,
    rows=(
        _counted("warm", "VisMem, warm start of both memories"),
        _counted("stage_one", "VisMem, stage I of both memories"),
        _trained("lora_long"),
        _trained("sft_long"),
        _trained("pvm"),
        _trained("pvm", "refine", "GRPO behind it"),
        TableRow("base", "base", same_as=("pvm-length", "base")),
        TableRow("warm_long", "VisMem, long, warm start only", same_as=("vismem-memory", "warm_long")),
        TableRow("long", "VisMem, long, warm start + stage I", same_as=("vismem-memory", "long")),
        *(TableRow(m, METHOD_LABELS[m], same_as=("pvm-length", m)) for m in ("lora_long", "sft_long", "pvm")),
        TableRow("pvm_grpo", "PVM + GRPO", same_as=("pvm-grpo", "pvm_grpo")),
    ),
    columns=(Column("operations", "operations, 10^12", percent=False), Column(FAR, "read at 1,024")),
    claims=(
        Claim(
            "Reinforcement pays: for its operations, stage I brings more than supervised LoRA on such lengths.",
            "ours (the reader's question)",
            (
                "base",
                "warm_long",
                "long",
                "lora_long",
                "sft_long",
                "pvm",
                "pvm_grpo",
                *(f"price_{name}" for name in ("warm", "stage_one", "lora_long", "sft_long", "pvm", "refine")),
            ),
            _per_operation,
        ),
    ),
)

STUDIES = (PRICE,)
