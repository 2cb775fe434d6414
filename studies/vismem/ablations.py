"""VisMem's ablations in the lab: when to invoke, sizes, forms, and both memories together."""

from __future__ import annotations

from typing import Any

from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Claim, Column, Plot, Study, TableRow
from studies.pvm.studies import READING, length_columns, training_of
from studies.vismem.cells import read_cell
from studies.vismem.studies import FAR, PAPER
from studies.vismem.when import labels, when_cell

# --- when to invoke ---------------------------------------------------------------------------------------------------

RANDOM_ROWS = ("random_25", "random_50", "random_75", "random_100")


def _beats_random(results: Results) -> Judgement:
    gaps = {row: results.difference("learned", row, "score") for row in (*RANDOM_ROWS, "long_50", "long_75")}
    words = ", ".join(f"{row} {gap.points()}" for row, gap in gaps.items())
    return judged(all(gap.low > 0 for gap in gaps.values()), f"Learned minus random, by rate and type: {words}.")


def _beats_clock(results: Results) -> Judgement:
    clock, schedule = (results.difference("learned", row, "score") for row in ("clock", "schedule"))
    room = results.difference("hindsight", "learned", "score")
    return judged(
        clock.low > 0 and schedule.low > 0,
        f"Learned minus the clock {clock.points()}, minus the schedule {schedule.points()}. With hindsight there is "
        f"room for {room.points()} more.",
    )


def _both_stages(results: Results) -> Judgement:
    gap = results.difference("learned", "random_50", "score")
    always = results.difference("learned", "always", "score")
    typed = results.difference("learned", "only_long", "score")
    return judged(
        gap.low > 0 and always.low > 0 and typed.low > 0,
        f"Stages I and II minus stage I alone: at random, 50 %, either type {gap.points()}; always, either type "
        f"{always.points()}; always, only long {typed.points()}. So what is needed is the type of memory, which a "
        "setting can say as well, and not a second stage.",
    )


def _values(results: Results) -> Judgement:
    rows = {"clock alone": "value_clock", "clock and states": "value_states"}
    clock = {name: results.difference(row, "clock", "score") for name, row in rows.items()}
    learned = results.difference("value_states", "learned", "score")
    more = results.difference("value_states", "value_clock", "score")
    words = ", ".join(f"{name} {gap.points()}" for name, gap in clock.items())
    return judged(
        any(gap.low > 0 for gap in clock.values()),
        f"Minus the hand clock, a policy of fitted values that knows the {words}; what the states add {more.points()}; "
        f"minus stage II {learned.points()}.",
    )


def _penalties(results: Results) -> Judgement:
    score = results.difference("learned", "no_penalties", "score")
    count = results.difference("learned", "no_penalties", "invocations")
    return judged(
        score.low > 0,
        f"With minus without p_type and p_neg: {score.points()}, {count.mean:+.2f} memories a sequence.",
    )


def _cost(results: Results) -> Judgement:
    saved = results.difference("learned", "costly", "invocations")
    lost = results.difference("costly", "learned", "score")
    used = results.at("learned", "invocations")
    return judged(
        saved.low > 0,
        f"By the literal reward {used.mean:.2f} memories a sequence of at most 2; a cost of .05 saves "
        f"{saved.mean:.2f} of them and changes the score by {lost.points()}.",
    )


LEARNED: dict[str, Any] = {"policy": "learned", "invocation": {}}

WHEN = Study(
    name="vismem-when",
    method="VisMem",
    title="When to invoke (stage II)",
    setting=(
        "Sequences of five blocks: 20 to 500 words of filler, a first fact, a decision at its full stop (short, long "
        "or no memory; at most two memories a sequence), two scored facts. Memories are the trained ones of the study"
        " above. All 51 outcomes of each script were computed with real memories, so counterfactuals are exact. Stage"
        " II trains the invocation tokens' head rows and biases (194 numbers) on 48 train scripts; scores are of 48 "
        "test scripts, by the most probable action. The clock's threshold and type and the fixed schedule were chosen"
        " on the train scripts; hindsight takes each test script's best outcome and is a bound that no policy can "
        "know. *Values*: for every decision the expected score of each action, by ridge regressions on all outcomes "
        "of the train scripts, from the last block backwards. **The cost of an invocation is ours and not the "
        "paper's.**"
    ),
    cell=when_cell,
    rows=(
        TableRow("never", "never", {"policy": "never"}),
        TableRow("always", "always (until the budget is spent), either type", {"policy": "always"}),
        *(
            TableRow(f"random_{p}", f"random, {p} %, either type", {"policy": "random", "probability": p / 100})
            for p in (25, 50, 75, 100)
        ),
        *(
            TableRow(
                f"long_{p}", f"random, {p} %, only long", {"policy": "random", "probability": p / 100, "types": [2]}
            )
            for p in (25, 50, 75)
        ),
        TableRow("only_short", "always, only short", {"policy": "always", "types": [1]}),
        TableRow("only_long", "always, only long", {"policy": "always", "types": [2]}),
        TableRow("learned", "learned (stage II, the paper's reward)", LEARNED),
        TableRow("no_penalties", "learned without p_type, p_neg", LEARNED | {"invocation": {"alpha": 0.0}}),
        TableRow("costly", "learned with a cost of .05 (ours)", LEARNED | {"invocation": {"cost": 0.05}}),
        *(
            TableRow(
                f"value_{name}",
                f"values fitted backwards (ours), of {label}",
                {"policy": "value", "states": states},
                seeds=(0, 1, 2),
            )
            for name, label, states in (("clock", "the clock", False), ("states", "the clock and the state", True))
        ),
        TableRow("clock", "a hand clock", {"policy": "clock"}),
        TableRow("schedule", "a fixed schedule", {"policy": "schedule"}),
        TableRow("hindsight", "hindsight (bound)", {"policy": "hindsight"}),
    ),
    columns=(
        Column("score", "score"),
        Column("invocations", "memories", percent=False),
        Column("long", "of them long"),
        *(Column(key, label) for key, label in labels().items()),
    ),
    claims=(
        Claim(
            "Learned invocation beats random invocation at any rate (MMVet 75.1 against 69.2 to 73.6).",
            f"{PAPER}, ablation",
            ("learned", *RANDOM_ROWS),
            _beats_random,
        ),
        Claim(
            "Both stages are needed: formation alone, invoked at random, is worse.",
            f"{PAPER}, ablation",
            ("learned", "random_50", "always", "only_long"),
            _both_stages,
        ),
        Claim(
            "Learned invocation beats a clock and a fixed schedule.",
            "ours (the reader's question)",
            ("learned", "clock", "schedule", "hindsight"),
            _beats_clock,
        ),
        Claim(
            "A policy that weighs what comes beats a clock.",
            "ours (the reader's question)",
            ("learned", "clock", "value_clock", "value_states"),
            _values,
        ),
        Claim("The penalties p_type and p_neg matter.", PAPER, ("learned", "no_penalties"), _penalties),
        Claim(
            "Without a cost the literal reward spends what it may; a cost makes it choose.",
            "ours",
            ("learned", "costly"),
            _cost,
        ),
    ),
    settings={
        "plan": {},
        "split": "test",
        "scripts": {"train": 12, "test": 12, "rows": 4, "max_gap": 500},
    },
    plot=Plot("bars", columns=("score",)),
)

# --- sizes, forms -----------------------------------------------------------------------------------------------------


def _longer(results: Results) -> Judgement:
    steps = (("long_4", "long_8"), ("long_8", "long_16"))
    gaps = {f"{a} -> {b}": results.difference(b, a, FAR) for a, b in steps}
    words = ", ".join(f"{name.replace('long_', '')} {gap.points()}" for name, gap in gaps.items())
    return judged(all(gap.mean > 0 for gap in gaps.values()), f"N_l at 1,024 tokens: {words} (mean over seeds).")


def _only(kind: str, **config: int) -> dict[str, Any]:
    return {"kind": kind, "config": config, "plan": {"kinds": [kind], "warm_steps": 300, "steps": 50}}


SIZE = Study(
    name="vismem-size",
    method="VisMem",
    title="K, N_s and N_l",
    setting=(
        "One type of memory at a time: 300 steps of warm start and 50 of stage I. An image has 16 visual tokens, so "
        "fewer latents must compress. The warm start's target is then the embeddings pooled over the image's grid."
    ),
    cell=read_cell,
    rows=(
        TableRow("base", "base", same_as=("pvm-length", "base")),
        *(TableRow(f"long_{n}", f"long, N = {n}, K = 8", _only("long", num_long=n)) for n in (4, 8, 16, 32)),
        *(TableRow(f"queries_{k}", f"long, N = 16, K = {k}", _only("long", num_queries=k)) for k in (2, 32)),
        *(TableRow(f"short_{n}", f"short, N = {n}, K = 8", _only("short", num_short=n)) for n in (4, 16)),
    ),
    columns=length_columns(),
    claims=(
        Claim(
            "Longer memories help, up to 16 or 32 latents.",
            f"{PAPER}, length ablation",
            ("long_4", "long_8", "long_16"),
            _longer,
        ),
    ),
    settings={**READING, "content": "own"},
    plot=Plot("bars", columns=(FAR,)),
)


def _together(results: Results) -> Judgement:
    more = results.difference("both", "pvm", "mean")
    return judged(
        more.low > 0,
        f"Both minus PVM alone, over lengths: {more.points()}; both minus VisMem alone: "
        f"{results.difference('both', 'vismem', 'mean').points()}. PVM alone leaves "
        f"{1 - results.at('pvm', 'mean').mean:.1%} to be gained.",
    )


BOTH = Study(
    name="vismem-pvm",
    method="both",
    title="PVM and VisMem together",
    setting=(
        "PVM with the warm-up and VisMem's long memory, each trained by itself as in the studies above, on one base: "
        "one memory before the scored facts, formed and read while PVM is on."
    ),
    cell=read_cell,
    rows=(
        TableRow("base", "base", same_as=("pvm-length", "base")),
        TableRow("pvm", "PVM", same_as=("pvm-length", "pvm")),
        TableRow("vismem", "VisMem, long", same_as=("vismem-memory", "long")),
        TableRow("both", "PVM and VisMem, long"),
    ),
    columns=length_columns(),
    claims=(Claim("The two add up.", "ours", ("both", "pvm", "vismem"), _together),),
    settings={**READING, "content": "own", "kind": "long", "plan": {}, "pvm": training_of("pvm")["plan"]},
    plot=Plot("bars", columns=("2048",)),
)

STUDIES = (WHEN, SIZE, BOTH)
