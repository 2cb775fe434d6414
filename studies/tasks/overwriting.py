"""What keeps a memory's look-up: continual learning of PVM, with what might keep one task from overwriting another.

The study `continual` found that `read` falls to 13 % once the memory has been trained on `colour`: one look-up is
trained over the other. Here each stage goes on from the last one as there, and one thing is changed at a time.
"""

from __future__ import annotations

from typing import Any

from keepsight.lab.study.results import Interval, Judgement, Results, interval, judged
from keepsight.lab.study.study import Claim, Column, Plot, Study, TableRow
from studies.tasks.cells import continual_cell
from studies.tasks.transfer import FAR, RATES, READING, STAGES, training_of

LOOK_UP = ("vision_reducer", "k_proj", "v_proj")
"""What the memory makes of the image: keys and values, and the map into their width."""
TRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "replay": ("replay: narrations of the earlier stages' tasks among the new one's", {"replay": True}),
    "slower": ("later stages at a tenth of the rate", {"plan_later": {"pvm_lr": RATES["pvm"] / 10}}),
    "frozen": ("the maps of the image (W_vis, k, v) frozen after the first stage", {"frozen": list(LOOK_UP)}),
    "anchored": ("half of every later stage's change taken back", {"kept": 0.5}),
    "gates": ("later stages train a task's own gates alone, over the first stage's look-up", {"own": ["gate"]}),
    "half_blind": ("every second step with sight blindfolded as well", {"plan_later": {"blindfold_share": 0.5}}),
}
LAST = f"first_{len(STAGES)}"


def _taught(results: Results, row: str) -> Interval:
    """What the later stages teach, right behind each, minus PVM as it was: mean over stages, by seed."""

    def mean(name: str) -> dict[int, float]:
        stages = [results.values(name, f"own_{n}") for n in range(2, len(STAGES) + 1)]
        return {seed: sum(values[seed] for values in stages) / len(stages) for seed in stages[0]}

    mine, theirs = mean(row), mean("pvm")
    return interval([mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())])


def _kept(results: Results) -> Judgement:
    worst = {row: min(results.at(row, f"first_{n}").mean for n in range(2, len(STAGES) + 1)) for row in ("pvm", *TRIES)}
    after = {row: results.difference(row, "pvm", "first_2") for row in TRIES}
    last = {row: results.difference(row, "pvm", LAST) for row in TRIES}
    own = {row: _taught(results, row) for row in TRIES}
    words = "; ".join(
        f"{row} {after[row].points()} after the second stage, {last[row].points()} after the last, what each stage "
        f"itself teaches {own[row].points()}, lowest mean {worst[row]:.0%}"
        for row in TRIES
    )
    taken = results.at("pvm", "taken").percent()
    good = [row for row in TRIES if after[row].low > 0 and last[row].low > 0 and own[row].high >= 0]
    return judged(
        bool(good),
        f"The first task at {FAR:,} tokens, minus PVM as it was (lowest mean {worst['pvm']:.0%}): {words}. "
        f"PVM as it was then answers {taken} of `read` with the asked cell's colour. (Holds if one of "
        "them is surely above at both times and its stages teach no surely less.)",
    )


OVERWRITING = Study(
    name="overwriting",
    method="PVM",
    title="What keeps one task's look-up from overwriting another's",
    setting=(
        f"The stages of `continual` ({', '.join(STAGES)}; 80 blindfolded steps and 40 with sight each), three seeds, "
        f"and one change at a time from the second stage on. At {FAR:,} tokens, test glyphs. A question "
        "names its task, two words before the answer."
    ),
    cell=continual_cell,
    rows=(
        TableRow("base", "base", same_as=("continual", "base")),
        TableRow("lora", "LoRA, for comparison", same_as=("continual", "lora")),
        TableRow("pvm", "PVM as in `continual`", {"replay": False}),
        *(TableRow(name, f"PVM, {label}", settings) for name, (label, settings) in TRIES.items()),
    ),
    columns=(
        *(Column(f"first_{n}", f"{STAGES[0]}, after stage {n}") for n in range(1, len(STAGES) + 1)),
        Column("taken", "answered with the cell's colour, after stage 2"),
        *(Column(f"own_{n}", f"{task}, after stage {n}") for n, task in enumerate(STAGES[1:], start=2)),
    ),
    claims=(
        Claim(
            "A memory can be taught one task after the other without losing the first: by replay, a lower rate, frozen "
            "maps of the image, an anchor, gates of a task's own, or more of the blindfold.",
            "ours (the reader's question)",
            ("pvm", *TRIES),
            _kept,
        ),
    ),
    settings={**READING, **training_of("pvm", 80, 40), "stages": list(STAGES)},
    seeds=(0, 1, 2),
    plot=Plot("bars", columns=("first_1", "first_2", LAST)),
)

STUDIES = (OVERWRITING,)
