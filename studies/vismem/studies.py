"""VisMem's questions to the lab: rows, claims and judges."""

from __future__ import annotations

from typing import Any

from keepsight.lab.study.results import Judgement, Results, interval, judged
from keepsight.lab.study.study import Claim, Column, Plot, Study, TableRow
from studies.pvm.studies import LENGTHS, READING, length_columns
from studies.vismem.cells import policy_cell, read_cell

PAPER = "VisMem paper"
FAR = "1024"
"""Where memories are compared: four times the length at which the base begins to fall."""
SCRATCH: dict[str, Any] = {"warm_steps": 0}
WARM: dict[str, Any] = {"steps": 0}

# --- one memory before the answers ------------------------------------------------------------------------------------


def _compare(column: str, *pairs: tuple[str, str]) -> Any:
    """Holds if each first row is surely ahead of its second."""

    def judge(results: Results) -> Judgement:
        gaps = [(a, b, results.difference(a, b, column)) for a, b in pairs]
        where = "averaged over lengths" if column == "mean" else f"at {int(column):,} tokens"
        words = "; ".join(f"{a} minus {b}: {gap.points()}" for a, b, gap in gaps)
        return judged(all(gap.low > 0 for _, _, gap in gaps), f"{where.capitalize()}, {words}.")

    return judge


def _better_than_fine_tuning(results: Results) -> Judgement:
    equal = {row: results.difference("long", row, FAR) for row in ("lora_long", "sft_long")}
    short = results.difference("long", "sft", FAR)
    return judged(
        all(gap.low > 0 for gap in equal.values()),
        f"At 1,024 tokens, long minus fine-tuning that saw such lengths, as stage I did: LoRA "
        f"{equal['lora_long'].points()}, full {equal['sft_long'].points()}. Minus full fine-tuning on texts of at most "
        f"252 tokens: {short.points()}, which compares lengths and not methods.",
    )


def _better_than_the_best(results: Results) -> Judgement:
    best = results.best(("sft", "lora_long", "sft_long"), "mean")
    gap = results.difference("long", best, "mean")
    near = results.difference("long", best, FAR)
    return judged(
        gap.low > 0,
        f"Long minus {best}, the best fine-tuning here: {gap.points()}; at 1,024 tokens {near.points()}. Stage I saw "
        "at most 1,024 tokens, fine-tuning at the target length up to 2,048.",
    )


def _reinforcement_pays(results: Results) -> Judgement:
    """Points at 1,024 tokens for 100 seconds of training, from each seed's own clock."""

    def rate(row: str, over: str, clock: str) -> dict[int, float]:
        seconds, mine, theirs = results.fact(row, clock), results.values(row, FAR), results.values(over, FAR)
        shared = sorted(seconds.keys() & mine.keys() & theirs.keys())
        return {seed: (mine[seed] - theirs[seed]) / float(seconds[seed]) * 100 for seed in shared}

    stage = rate("long", "warm_long", "stage_one_seconds")
    others = {
        "the warm start, which is supervised": rate("warm_long", "base", "warm_seconds"),
        "LoRA at the target length": rate("lora_long", "base", "training_seconds"),
        "SFT on short texts": rate("sft", "base", "training_seconds"),
    }
    if not stage or not all(others.values()):
        return Judgement("cannot be tested here", "The results do not say how long training took.")
    words = ", ".join(f"{name} {interval(list(found.values())).points()}" for name, found in others.items())
    best = others["LoRA at the target length"]
    gap = interval([stage[seed] - best[seed] for seed in sorted(stage.keys() & best.keys())])
    return judged(
        gap.low > 0,
        f"Gained at 1,024 tokens for 100 seconds by the clock: stage I on top of the warm start "
        f"{interval(list(stage.values())).points()}, {words}; stage I minus LoRA {gap.points()}. Seconds of one thread "
        "on a machine that others used.",
    )


def _scratch(results: Results) -> Judgement:
    gain = results.difference("scratch_long", "base", FAR)
    short = results.difference("scratch_short", "base", FAR)
    own = results.difference("scratch_long", "scratch_other", FAR)
    own_short = results.difference("scratch_short", "scratch_short_other", FAR)
    learnt = {"long": own.low > 0.05, "short": own_short.low > 0.05}
    image = " and ".join(kind for kind, did in learnt.items() if did) or "neither"
    return judged(
        all(learnt.values()) and gain.low > 0 and short.low > 0,
        f"At 1,024 tokens, after as many steps: long {gain.points()} over the base, short {short.points()}. Own "
        f"image's latents minus another image's: long {own.points()}, short {own_short.points()}. So of the two, "
        f"{image} learnt the image; what else is gained comes from the latents being there, whatever they hold. Tried "
        "harder: `vismem-scratch`.",
    )


def _copy(results: Results) -> Judgement:
    gap = results.difference("long", "embeddings", FAR)
    mean = results.difference("long", "embeddings", "mean")
    return judged(
        gap.low > 0,
        f"Long memory minus plain re-insertion: {gap.points()} at 1,024 tokens, {mean.points()} averaged over lengths. "
        "Re-insertion needs no training; with as many latents as visual tokens a memory cannot compress.",
    )


def _uncapped(results: Results) -> Judgement:
    trained = results.difference("long_all_text", "long", FAR)
    near = results.difference("long_all_text", "long", "32")
    same = results.difference("long_uncapped", "long", FAR)
    return judged(
        trained.high >= 0,
        f"Trained and read with all text states minus with the last 8: {near.points()} at 32 tokens, "
        f"{trained.points()} at 1,024. The weights that were trained with 8, read with all of them: {same.points()} at "
        "1,024. The long-term former is the language model that loses the image in long texts.",
    )


def _noise(results: Results) -> Judgement:
    gaps = {row: results.difference(row, "base", "mean") for row in ("short_noise", "long_noise", "embeddings_noise")}
    words = ", ".join(f"{row} {gap.points()}" for row, gap in gaps.items())
    return judged(all(gap.high < 0.02 for gap in gaps.values()), f"Against the base, averaged over lengths: {words}.")


def _follows(results: Results) -> Judgement:
    parts, ok = [], True
    for row in ("short", "long"):
        lost = results.difference(row, f"{row}_other", FAR)
        follows = results.at(f"{row}_other", f"follows_{FAR}")
        ok &= lost.low > 0
        parts.append(
            f"{row}: own image read {lost.points()} better than with another image's latents, and then "
            f"{follows.percent()} of the answers are right for the other image (chance: 10 %)"
        )
    return judged(ok, f"At 1,024 tokens, {'; '.join(parts)}. The model still sees its own image.")


MEMORY = Study(
    name="vismem-memory",
    method="VisMem",
    title="One memory, formed just before the answers",
    setting=(
        "Narrations as in PVM's study; one memory is invoked at the full stop before the six facts that are scored. "
        "The base is frozen throughout. K = 8, N_s = N_l = 16 (as many as the image has visual tokens), 151 k memory "
        "parameters. **The warm start (400 steps, label-free latent distillation) and the cap of 8 text states in H "
        "are ours and not the paper's**; stage I is GRPO on the reward alone (120 steps, groups of 16, either type in"
        " turn, narrations of 200 to 1,024 tokens). From scratch it is the same."
    ),
    cell=read_cell,
    rows=(
        TableRow("base", "base = never", same_as=("pvm-length", "base")),
        TableRow("sft", "SFT (full fine-tuning, texts of at most 252 tokens)", same_as=("pvm-length", "sft")),
        TableRow("lora_long", "LoRA trained at the target length (up to 2,048)", same_as=("pvm-length", "lora_long")),
        TableRow("sft_long", "SFT trained at the target length (up to 2,048)", same_as=("pvm-length", "sft_long")),
        TableRow(
            "embeddings",
            "plain re-insertion of the visual embeddings (training-free)",
            {"content": "embeddings", "untrained": True},
        ),
        TableRow("embeddings_other", "the same, of another image", {"content": "embeddings_other", "untrained": True}),
        TableRow(
            "embeddings_noise", "random vectors of equal norm", {"content": "embeddings_noise", "untrained": True}
        ),
        TableRow("warm_short", "short, warm start only", {"kind": "short", "plan": WARM}),
        TableRow("warm_long", "long, warm start only", {"kind": "long", "plan": WARM}),
        TableRow("short", "short, warm start + stage I", {"kind": "short"}),
        TableRow("long", "long, warm start + stage I", {"kind": "long"}),
        TableRow("long_uncapped", "long, the same weights, all text states in H", {"text_states": None}),
        TableRow(
            "long_all_text", "long, trained and read with all text states in H", {"config": {"max_text_states": None}}
        ),
        TableRow(
            "long_tokens",
            "long, formed from the prompt's and the last 8 tokens' input embeddings",
            {"config": {"long_input": "tokens"}},
            seeds=(0, 1, 2),
        ),
        TableRow(
            "long_all_tokens",
            "long, formed from the input embeddings of everything so far (the paper to the letter)",
            {"config": {"long_input": "tokens", "max_text_states": None}},
            seeds=(0, 1, 2),
        ),
        TableRow("short_other", "short, latents of another image", {"kind": "short", "content": "other"}),
        TableRow("long_other", "long, latents of another image", {"kind": "long", "content": "other"}),
        TableRow("short_noise", "short, random latents of equal norm", {"kind": "short", "content": "noise"}),
        TableRow("long_noise", "long, random latents of equal norm", {"kind": "long", "content": "noise"}),
        TableRow("scratch_short", "short, stage I from scratch (the paper)", {"kind": "short", "plan": SCRATCH}),
        TableRow(
            "scratch_short_other",
            "the same, latents of another image",
            {"kind": "short", "content": "other", "plan": SCRATCH},
        ),
        TableRow("scratch_long", "long, stage I from scratch (the paper)", {"kind": "long", "plan": SCRATCH}),
        TableRow(
            "scratch_other",
            "the same, latents of another image",
            {"kind": "long", "plan": SCRATCH, "content": "other"},
        ),
    ),
    columns=(*length_columns(), Column(f"follows_{FAR}", "other image's answers at 1,024")),
    claims=(
        Claim(
            "A frozen model that is given a memory reads better than without (7B, 12 benchmarks: 65.5 against 54.5).",
            f"{PAPER}, main table",
            ("short", "long", "base"),
            _compare(FAR, ("short", "base"), ("long", "base")),
        ),
        Claim(
            "It is better than fine-tuning (65.5 against 56.5).",
            f"{PAPER}, main table",
            ("long", "sft", "lora_long", "sft_long"),
            _better_than_fine_tuning,
        ),
        Claim(
            "It is better than the best fine-tuning, averaged over lengths.",
            "ours (the reader's question)",
            ("long", "sft", "lora_long", "sft_long"),
            _better_than_the_best,
        ),
        Claim(
            "Reinforcement pays: for the time it takes, stage I brings more than supervised LoRA on such lengths.",
            "ours (the reader's question)",
            ("base", "sft", "lora_long", "warm_long", "long"),
            _reinforcement_pays,
        ),
        Claim(
            "Stage I learns to form memories from rewards alone.",
            f"{PAPER}, two-stage training",
            ("scratch_long", "scratch_short", "scratch_other", "scratch_short_other", "base"),
            _scratch,
        ),
        Claim(
            "Stage I improves on the warm start.",
            "ours",
            ("short", "warm_short", "long", "warm_long"),
            _compare(FAR, ("short", "warm_short"), ("long", "warm_long")),
        ),
        Claim(
            "A learned memory is better than putting the visual embeddings in again.",
            "ours (the reader's question)",
            ("long", "embeddings"),
            _copy,
        ),
        Claim(
            "H may hold all text since the last memory.",
            f"{PAPER}, query builder",
            ("long", "long_uncapped", "long_all_text"),
            _uncapped,
        ),
        Claim("What helps is the image in the latents.", "ours (control)", ("short_other", "long_other"), _follows),
        Claim(
            "Random latents of equal norm do not help.",
            "ours (control)",
            ("short_noise", "long_noise", "embeddings_noise", "base"),
            _noise,
        ),
    ),
    settings={**READING, "content": "own", "kind": "long", "plan": {}},
    plot=Plot("lines", ("long", "short", "embeddings", "warm_long", "scratch_long", "base"), tuple(map(str, LENGTHS))),
)

# --- memories at random -----------------------------------------------------------------------------------------------


def _too_much(results: Results) -> Judgement:
    rows = ("random_25", "random_50", "random_75", "random_100")
    best = results.best(rows, "mean")
    gap = results.difference("random_100", best, "mean") if best != "random_100" else None
    words = ", ".join(f"{row.partition('_')[2]} %: {results.at(row, 'mean').percent()}" for row in rows)
    return judged(
        gap is not None and gap.high < 0,
        f"Averaged over lengths, {words}" + ("." if gap is None else f"; 100 % minus the best: {gap.points()}."),
    )


def _types(results: Results) -> Judgement:
    gap = results.difference("only_short_100", "only_long_100", "mean")
    helps = results.difference("only_short_100", "base", FAR)
    return judged(
        gap.low > 0,
        f"Only short minus only long, at every full stop, averaged over lengths: {gap.points()}; only short minus "
        f"never, at 1,024 tokens: {helps.points()}. All questions here are perception (which digit is where); the "
        "study `vismem-text` has both kinds.",
    )


EVERYWHERE: dict[str, Any] = {"probability": 1.0, "types": ["short", "long"]}

RANDOM = Study(
    name="vismem-random",
    method="VisMem",
    title="Memories at random full stops",
    setting=(
        "The trained memories of the study above, invoked with a probability at every full stop (11 in a narration), "
        "without a budget; either type equally likely unless said otherwise. Each memory adds 18 positions, so always"
        " invoking adds 198."
    ),
    cell=policy_cell,
    rows=(
        TableRow("base", "never", same_as=("pvm-length", "base")),
        *(
            TableRow(f"random_{int(100 * p)}", "always" if p == 1 else f"{p:.0%}", {"probability": p})
            for p in (0.25, 0.5, 0.75, 1.0)
        ),
        TableRow("only_short_100", "always, only short", {"types": ["short"]}),
        TableRow("only_long_100", "always, only long", {"types": ["long"]}),
    ),
    columns=(
        Column("512", "512"),
        Column("1024", "1,024"),
        Column("2048", "2,048"),
        Column("mean", "mean"),
        Column("invocations", "memories", percent=False),
    ),
    claims=(
        Claim(
            "Too much invocation hurts: 100 % at random is worse than less (MV-Math 29.8, 26.1, 21.9, 17.5 for 25 to "
            "100 %).",
            f"{PAPER}, ablation",
            ("random_25", "random_50", "random_75", "random_100"),
            _too_much,
        ),
        Claim(
            "Short memory helps perception more than long memory does.",
            f"{PAPER}, ablation (half of it; both halves in `vismem-text`)",
            ("base", "only_short_100", "only_long_100"),
            _types,
        ),
    ),
    settings={**READING, "lengths": [512, 1024, 2048], "plan": {}, **EVERYWHERE},
    plot=Plot("bars", columns=("mean",)),
)


STUDIES = (MEMORY, RANDOM)
