"""What a latent memory can hold: more cells than latents, and text against pixels.

Two images have 32 cells, so fewer latents must compress. And `read` asks what only pixels hold, `recall` what only the
text so far holds, so that short-term memory (formed from pixels) and long-term memory (formed from the model's states)
are told apart by design.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from keepsight.lab.study.results import Interval, Judgement, Results, judged
from keepsight.lab.study.study import Claim, Column, Plot, Study, TableRow
from studies.tasks.cells import cross_cell
from studies.tasks.transfer import FAR, MEMORY, READING, training_of, unknown

SIZES = (4, 8, 16, 32)
"""Latents of a long-term memory."""
FEW = tuple(size for size in SIZES if size < 32)


HARDER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "deeper_16": ("more queries (32), a deeper query builder (4 layers)", {"num_queries": 32, "query_layers": 4}, {}),
    "rebuilt_16": ("a warm start that must also rebuild all 32 embeddings", {}, {"rebuild": True}),
    "taught_16": (
        "all of that, and the right answers in place of rewards",
        {"num_queries": 32, "query_layers": 4},
        {"rebuild": True, "taught": True, "steps": 120},
    ),
}
"""Memories of 16 latents that might compress: label, configuration, plan."""


def _insert(content: str, latents: int = 32) -> dict[str, Any]:
    return {"method": "insert", "content": content, "config": {"num_long": latents}}


def _words(gaps: dict[str, Interval]) -> str:
    return ", ".join(f"{name} {gap.points()}" for name, gap in gaps.items())


def _compresses(results: Results) -> Judgement:
    part = {str(n): results.difference(f"long_{n}", f"part_{n}", "pair") for n in FEW}
    pooled = {str(n): results.difference(f"long_{n}", f"pooled_{n}", "pair") for n in FEW}
    return unknown(results, ("pair",)) or judged(
        any(part[str(n)].low > 0 and pooled[str(n)].low > 0 for n in FEW),
        f"At {FAR:,} tokens, by number of latents, a trained memory minus as many of the 32 visual embeddings: "
        f"{_words(part)}; minus as many averages of neighbouring ones: {_words(pooled)}. (Holds if any size is ahead "
        "of both.)",
    )


def _compresses_harder(results: Results) -> Judgement:
    part = {row: results.difference(row, "part_16", "pair") for row in HARDER}
    pooled = {row: results.difference(row, "pooled_16", "pair") for row in HARDER}
    plain = {row: results.difference(row, "long_16", "pair") for row in HARDER}
    return unknown(results, ("pair",)) or judged(
        any(part[row].low > 0 and pooled[row].low > 0 for row in HARDER),
        f"At {FAR:,} tokens, minus 16 of the 32 visual embeddings: {_words(part)}; minus 16 averages: "
        f"{_words(pooled)}; minus the plain memory of 16: {_words(plain)}. (Holds if one is ahead of the "
        "first two. The last is supervised: what cannot be taught cannot be found by rewards.)",
    )


def _longer(results: Results) -> Judgement:
    steps = {f"{a} -> {b}": results.difference(f"long_{b}", f"long_{a}", "pair") for a, b in pairwise(SIZES)}
    whole = results.difference("long_32", "insert", "pair")
    return unknown(results, ("pair",)) or judged(
        all(gap.mean > 0 for gap in steps.values()),
        f"N_l at {FAR:,} tokens: {_words(steps)} (holds if all means rise). 32 latents minus all 32 embeddings again: "
        f"{whole.points()}.",
    )


COMPRESS = Study(
    name="vismem-compress",
    method="VisMem",
    title="More cells than latents",
    setting=(
        "Two images, told apart by their paper, have 32 cells and 32 visual tokens (`pair`). One long memory of N_l "
        "latents is formed just before the questions; warm start (ours) and stage I on such narrations. What cannot "
        "compress: the visual embeddings again, all 32 of them or N_l evenly spread ones. What compresses without "
        "learning: N_l averages of neighbouring embeddings, which is also what the warm start aims at. Training-free "
        "rows are of the same bases, those of the studies on transfer."
    ),
    cell=cross_cell,
    rows=(
        TableRow("base", "base", {"method": "base"}),
        TableRow("insert", "all 32 visual embeddings again (training-free)", _insert("embeddings")),
        *(TableRow(f"part_{n}", f"{n} of the 32 visual embeddings", _insert("part", n)) for n in FEW),
        *(TableRow(f"pooled_{n}", f"{n} averages of visual embeddings", _insert("pooled", n)) for n in FEW),
        *(
            TableRow(f"long_{n}", f"long memory, N = {n}", {**training_of("vismem"), "config": {"num_long": n}})
            for n in SIZES
        ),
        *(
            TableRow(
                row,
                f"long memory, N = 16, {label}",
                {"method": "vismem", "plan": {**MEMORY, **plan}, "config": {"num_long": 16, **config}},
                seeds=(0, 1, 2),
            )
            for row, (label, config, plan) in HARDER.items()
        ),
    ),
    columns=(Column("pair", f"pair at {FAR:,}"), Column("pair_near", "pair at 48")),
    claims=(
        Claim(
            "A memory compresses: it holds more of the images than as many visual embeddings, picked or averaged.",
            "ours (the reader's question)",
            ("base", *(f"{kind}_{n}" for kind in ("long", "part", "pooled") for n in FEW)),
            _compresses,
        ),
        Claim(
            "It compresses if it is given more queries, a deeper query builder, or a reconstruction objective.",
            "ours (the reader's question)",
            ("base", "part_16", "pooled_16", "long_16", *HARDER),
            _compresses_harder,
        ),
        Claim(
            "Longer memories help while they are smaller than what they hold (N_l from 4 to 32).",
            "VisMem paper, length ablation",
            ("base", "insert", *(f"long_{n}" for n in SIZES)),
            _longer,
        ),
    ),
    settings={**READING, "ask": ["pair"], "train_on": ["pair"]},
    plot=Plot("bars", columns=("pair",)),
)

# --- pixels against text ----------------------------------------------------------------------------------------------

LONG_ROWS = ("long", "long_all")


def _types(results: Results) -> Judgement:
    rows = ("short", *LONG_ROWS)
    gains = {task: {row: results.difference(row, "base", task) for row in rows} for task in ("read", "recall")}
    seeing, recalling = (results.best(LONG_ROWS, task) for task in ("read", "recall"))
    sees = results.difference("short", seeing, "read")
    recalls = results.difference(recalling, "short", "recall")
    told = "; ".join(f"{task}: {_words(found)}" for task, found in gains.items())
    base = {task: results.at("base", task) for task in gains}
    word = (
        f"At {FAR:,} tokens the base has {base['read'].percent()} of what only pixels hold (`read`) and "
        f"{base['recall'].percent()} of what only the text holds (`recall`). Over the base, {told}. On `read`, short "
        f"minus the better long memory ({seeing}): {sees.points()}; on `recall`, the better long memory ({recalling}) "
        f"minus short: {recalls.points()}."
    )
    possible = {
        "read": results.difference("insert", "base", "read"),
        "recall": results.difference("notes", "base", "recall"),
    }
    if any(gap.low <= 0 for gap in possible.values()):
        return Judgement(
            "cannot be tested here",
            "There is no positive control: what is needed, put in again before the questions, gives "
            f"{_words(possible)}, so no memory could have shown its worth on both. {word}",
        )
    helps = gains["read"]["short"].low > 0 and gains["recall"][recalling].low > 0
    return unknown(results, ("read", "recall")) or judged(helps and sees.low > 0 and recalls.low > 0, word)


def _each_its_own(results: Results) -> Judgement:
    read = results.difference("pvm", "base", "read")
    recall = results.difference("pvm", "base", "recall")
    words = results.difference("notes", "base", "recall")
    pixels = results.difference("insert", "base", "read")
    crossed = {
        "embeddings on recall": results.difference("insert", "base", "recall"),
        "notes on read": results.difference("notes", "base", "read"),
    }
    found = (
        f"PVM over the base: read {read.points()}, recall {recall.points()} (holds if only the first is surely above "
        f"zero). Put in again before the questions, the visual embeddings give read {pixels.points()}, the notes' "
        f"words give recall {words.points()}; crosswise "
        f"{_words(crossed)}."
    )
    if words.low <= 0:
        return Judgement("cannot be tested here", f"Nothing brought `recall` back, so its half has no control. {found}")
    return unknown(results, ("read", "recall")) or judged(read.low > 0 and recall.low <= 0, found)


TOLD = Study(
    name="vismem-text",
    method="VisMem",
    title="What only pixels hold, and what only the text holds",
    setting=(
        "`read` asks for a digit of the image. `recall` asks for one of eight digits that the first 32 tokens of the "
        "text have noted and that no pixel holds. One memory is formed just before the questions, hundreds "
        "of words later, and trained on both tasks (warm start and stage I, as in the studies on transfer). The long "
        "memory is formed from the latest 8 text states (ours), or from all of them, trained so as well (as "
        "published). For comparison: what is needed, put in again before the questions; words put in again are read "
        "no better, so that row is no bound."
    ),
    cell=cross_cell,
    rows=(
        TableRow("base", "none", {"method": "base"}),
        TableRow(
            "short",
            "only short",
            {**training_of("vismem"), "plan": {**MEMORY, "kinds": ["short"]}, "kinds": ["short"]},
        ),
        TableRow("long", "only long, formed from 8 text states", training_of("vismem")),
        TableRow(
            "long_all",
            "only long, formed from all text states",
            {**training_of("vismem"), "config": {"num_long": 16, "max_text_states": None}},
        ),
        TableRow("pvm", "PVM with blindfold warm-up (ours)", training_of("pvm")),
        TableRow("insert", "the visual embeddings again", _insert("embeddings", 16)),
        TableRow("notes", "the words of the notes again", _insert("notes", 16)),
    ),
    columns=(
        Column("read", f"read at {FAR:,}"),
        Column("recall", f"recall at {FAR:,}"),
        Column("read_near", "read at 48"),
        Column("recall_near", "recall at 48"),
    ),
    claims=(
        Claim(
            "Short memory helps perception, long memory helps reasoning: here, short brings back what only pixels "
            "hold, long what only the text holds.",
            "VisMem paper, ablation",
            ("base", "short", *LONG_ROWS, "insert", "notes"),
            _types,
        ),
        Claim(
            "PVM brings back what only pixels hold and nothing of what only the text holds.",
            "ours",
            ("base", "pvm", "insert", "notes"),
            _each_its_own,
        ),
    ),
    settings={**READING, "config": {"num_long": 16}, "ask": ["read", "recall"], "train_on": ["read", "recall"]},
    plot=Plot("bars", columns=("read", "recall")),
)

STUDIES = (COMPRESS, TOLD)
