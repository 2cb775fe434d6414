"""Cross-domain and continual learning: what a memory, LoRA and full fine-tuning carry over to tasks they did not see.

On bases that know several tasks of `studies.tasks.tasks` in short narrations; training shows PVM, LoRA and full
fine-tuning narrations of at most about 250 tokens, and tests ask at `FAR`.
"""

from __future__ import annotations

from typing import Any

from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Claim, Column, Plot, Study, TableRow
from studies.pvm.studies import METHOD_LABELS, TRIES
from studies.tasks.cells import continual_cell, cross_cell
from studies.tasks.pretraining import LEARNT

PERCEPTION = ("read", "colour")
OTHERS = tuple(name for name in LEARNT if name not in PERCEPTION)
STAGES = ("read", "colour", "pair", "recall")
"""Continual learning: what each of the four stages trains on."""
METHODS = ("pvm", "vismem", "lora", "sft")
LABELS = METHOD_LABELS | {"vismem": "VisMem, long (warm start + stage I)"}
FAR = 1024
"""Generated tokens at which is asked: where the bases fail at every task, and do not where filler is hidden."""
READING: dict[str, Any] = {
    "near": 48,
    "far": FAR,
    "rows": 32,
    "split": "test",
    "base": {"tasks": list(LEARNT)},
    "train_tokens": 220,
    "config": {"num_long": 32},
}
MEMORY: dict[str, Any] = {"kinds": ["long"], "warm_steps": 200, "steps": 40, "shortest": 200, "longest": 600}
"""VisMem's training on tasks: label-free warm start, then stage I on rewards."""
RATES = {"pvm": 2e-3, "lora": 3e-5, "sft": 3e-5}
"""Peak learning rates, of three tries each on validation glyphs of seed 0: LoRA's and SFT's by the mean at 1,024 tokens
after training on all tasks, PVM's by what it reads under the blindfold, on fewer tasks."""
KNOWN = 0.8
"""Accuracy in short narrations below which a base does not know a task, so that nothing can be said about it."""


def training_of(method: str, warmup: int = 240, steps: int = 80) -> dict[str, Any]:
    """Settings that train `method`: so many warm-up steps and further ones; VisMem by `MEMORY`."""
    if method == "vismem":
        return {"method": method, "plan": MEMORY}
    plan = {"batch": 8, "warmup_steps": warmup, "steps": steps, TRIES[method][0]: RATES[method]}
    return {"method": method, "plan": plan}


def unknown(results: Results, tasks: tuple[str, ...], near: str = "{}_near") -> Judgement | None:
    """The verdict where the bases do not know these tasks in short narrations; None where they do."""
    known = {task: results.at("base", near.format(task)).mean for task in tasks}
    if min(known.values(), default=1.0) >= KNOWN:
        return None
    told = ", ".join(f"{task} {value:.0%}" for task, value in known.items())
    return Judgement("cannot be tested here", f"The bases do not know the tasks in short outputs ({told}).")


def _carries_over(method: str) -> Any:
    def judge(results: Results) -> Judgement:
        gains = {task: results.difference(f"{method}_perception", "base", task) for task in OTHERS}
        mean = results.difference(f"{method}_perception", "base", "others")
        loss = results.difference(f"{method}_perception", f"{method}_all", "others")
        rivals = {m: results.difference(f"{m}_perception", "base", "others") for m in METHODS if m != method}
        words = ", ".join(f"{task} {gap.points()}" for task, gap in gains.items())
        beside = ", ".join(f"{LABELS[m]} {gap.points()}" for m, gap in rivals.items())
        return unknown(results, OTHERS) or judged(
            mean.low > 0,
            f"Trained on perception only, over the base on the other tasks at {FAR:,} tokens: {mean.points()} "
            f"({words}); against the same trained on all: {loss.points()}. Others, trained on perception only, over "
            "the base: "
            f"{beside}.",
        )

    return judge


SHORT: dict[str, Any] = {
    "method": "vismem",
    "plan": {**MEMORY, "kinds": ["short"], "warm_steps": 400},
    "kinds": ["short"],
    "train_on": list(PERCEPTION),
}
"""A short memory; its warm start takes twice the long one's steps (LOG.md)."""


def _short_carries_over(results: Results) -> Judgement:
    gains = {task: results.difference("short_perception", "base", task) for task in (*PERCEPTION, *OTHERS)}
    mean = results.difference("short_perception", "base", "others")
    own = results.difference("short_perception", "base", "perception")
    words = ", ".join(f"{task} {gap.points()}" for task, gap in gains.items())
    found = (
        f"Over the base at {FAR:,} tokens: perception, which it was trained on, {own.points()}; the others "
        f"{mean.points()} ({words})."
    )
    if own.low <= 0:
        return Judgement(
            "cannot be tested here", f"It learnt too little of what it was trained on to carry over. {found}"
        )
    return unknown(results, OTHERS) or judged(mean.low > 0, found)


CROSS = Study(
    name="cross-domain",
    method="both",
    title="Cross-domain: trained on perception, tested on all",
    setting=(
        "Bases that know five tasks in short narrations (mean at 48 tokens). Each method trains either on perception "
        f"only (`read` a digit, name its `colour`) or on all, and is asked each task at {FAR:,} tokens. `path` asks "
        "for running sums along a path; `pair` shows two images told apart by their paper; `recall` asks what only "
        "the text has said, where a memory of the image cannot help. PVM, LoRA and SFT: 240 short dense steps, "
        "blindfolded for PVM, and 80 on narrations of at most about 250 tokens, learning rates of three tries each on "
        "validation glyphs. VisMem: one long memory of 32 latents formed just before the questions, 200 steps of warm "
        "start (ours) and 40 of stage I, on narrations of 200 to 600 tokens; one short memory of 16 likewise, "
        "with 400 steps of warm start. The lab's other tasks (`locate`, "
        "`count`, `rows`) are left out: a base of this size does not learn them within minutes, and what a base "
        "cannot do in short outputs no memory can bring back in long ones."
    ),
    cell=cross_cell,
    rows=(
        TableRow("base", "base", {"method": "base"}),
        *(
            TableRow(
                f"{method}_{name}",
                f"{LABELS[method]}, trained on {name}",
                {**training_of(method), "train_on": list(tasks)},
            )
            for name, tasks in (("perception", PERCEPTION), ("all", LEARNT))
            for method in METHODS
        ),
        TableRow(
            "short_perception", "VisMem, short (warm start + stage I), trained on perception", SHORT, seeds=(0, 1, 2)
        ),
    ),
    columns=(
        *(Column(task, task) for task in LEARNT),
        Column("perception", "mean of perception"),
        Column("others", "mean of the others"),
        Column("near", "mean at 48 tokens"),
    ),
    claims=(
        Claim(
            "What a latent memory (here the long one) learns carries over to tasks that it was not trained on (trained "
            "on two general sets only: 72.9, 66.4, 39.1, 74.9; on all: 75.1, 69.8, 41.4, 77.0).",
            "VisMem paper, cross-domain",
            ("base", *(f"{m}_{n}" for m in METHODS for n in ("perception", "all"))),
            _carries_over("vismem"),
        ),
        Claim(
            "The same of the short memory.",
            "VisMem paper, cross-domain",
            ("base", "short_perception"),
            _short_carries_over,
        ),
        Claim(
            "The same of PVM.",
            "ours",
            ("base", *(f"{m}_{n}" for m in METHODS for n in ("perception", "all"))),
            _carries_over("pvm"),
        ),
    ),
    settings={**READING, "ask": list(LEARNT), "groups": {"perception": list(PERCEPTION), "others": list(OTHERS)}},
    plot=Plot("bars", columns=("perception", "others")),
)


def _forgets_less(method: str) -> Any:
    def judge(results: Results) -> Judgement:
        last, rivals = f"first_{len(STAGES)}", [m for m in METHODS if m != method]
        ahead = {m: results.difference(method, m, last) for m in rivals}
        kept = {m: results.difference(m, method, "forgotten") for m in ("lora", "sft")}
        lost = ", ".join(f"{LABELS[m]} {results.at(m, 'forgotten').points()}" for m in METHODS)
        words = ", ".join(f"{gap.points()} against {LABELS[m]}" for m, gap in ahead.items())
        less = ", ".join(f"{LABELS[m]} {gap.points()}" for m, gap in kept.items())
        return judged(
            all(ahead[m].low > 0 for m in ("lora", "sft")),
            f"On the first stage's task after the last stage, at {FAR:,} tokens: {words}. Lost from the first stage to "
            f"the last: {lost}; the others' loss minus its own: {less}.",
        )

    return judge


CONTINUAL = Study(
    name="continual",
    method="both",
    title="Continual learning over four stages",
    setting=(
        f"Four stages of training, one after the other and without replay: {', '.join(STAGES)}. After each, the first "
        f"stage's task is asked at {FAR:,} tokens, and the stage's own. For PVM, LoRA and SFT a stage is 120 steps, of "
        "which the first 80 are short and dense, blindfolded for PVM. For VisMem it is 30 steps of stage I behind a "
        "warm start of 150 steps in the first stage and of 40 in the others. Bases as in the study before."
    ),
    cell=continual_cell,
    rows=(
        TableRow("base", "base", {"method": "base"}),
        *(TableRow(method, LABELS[method], training_of(method, 80, 40)) for method in METHODS if method != "vismem"),
        TableRow(
            "vismem",
            LABELS["vismem"],
            {
                "method": "vismem",
                "plan": {**MEMORY, "warm_steps": 150, "steps": 30},
                "plan_later": {"warm_steps": 40},
            },
        ),
    ),
    columns=(
        *(Column(f"first_{n}", f"{STAGES[0]}, after stage {n}") for n in range(1, len(STAGES) + 1)),
        *(Column(f"own_{n}", f"{task}, after stage {n}") for n, task in enumerate(STAGES[1:], start=2)),
    ),
    claims=(
        Claim(
            "A latent memory forgets less than fine-tuning over four stages (MMVet: 78.6, 78.9, 71.3, 72.1 against "
            "71.4, 70.6, 62.3, 60.1).",
            "VisMem paper, continual learning",
            METHODS,
            _forgets_less("vismem"),
        ),
        Claim("The same of PVM.", "ours", METHODS, _forgets_less("pvm")),
    ),
    settings={**READING, "stages": list(STAGES)},
    plot=Plot("bars", columns=("first_1", f"first_{len(STAGES)}")),
)

STUDIES = (CROSS, CONTINUAL)
