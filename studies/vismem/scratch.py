"""Stage I from rewards alone, tried harder: a denser reward, larger groups, a former that begins as the base's reading.

The study `vismem-memory` found that without a warm start stage I learns no image. Here each of what might be lacking is
given to it, one after the other, and the control is the same: what another image's latents do.
"""

from __future__ import annotations

from typing import Any

from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Claim, Column, Study, TableRow
from studies.pvm.studies import READING
from studies.vismem.cells import read_cell
from studies.vismem.studies import FAR, PAPER

DENSE: dict[str, Any] = {"kinds": ["long"], "warm_steps": 0, "steps": 120, "credit": "fact", "group": 64}
"""The long-term memory alone, so twice its steps in `vismem-memory`; four times the group; credit by the fact."""
TOKENS: dict[str, Any] = {"long_input": "tokens"}
"""The former runs on the prompt's input embeddings, as the model itself does when it reads."""
TRIES = {
    "dense": ("denser reward, groups of 64", {"plan": DENSE}),
    "reading": (
        "the same, the former begins as the base's own reading",
        {"plan": {**DENSE, "start": "cells"}, "config": TOKENS},
    ),
}


def _learns(row: str) -> Any:
    def judge(results: Results) -> Judgement:
        own, gain = results.difference(row, f"{row}_other", FAR), results.difference(row, "base", FAR)
        follows = results.at(f"{row}_other", f"follows_{FAR}").percent()
        words = (
            f"At 1,024 tokens, own image's latents minus another image's: {own.points()}; {follows} of the answers are "
            f"then right for the other image; over the base {gain.points()}, minus the memory that had a warm start "
            f"{results.difference(row, 'warm', FAR).points()}."
        )
        if row == "reading":
            before = results.difference("cells", "cells_other", FAR)
            words += (
                f" Before any training: own minus another image's {before.points()}, over the base "
                f"{results.difference('cells', 'base', FAR).points()}."
            )
        return judged(own.low > 0.05 and gain.low > 0, f"{words} (Holds if surely 5 points, and above the base.)")

    return judge


SCRATCH = Study(
    name="vismem-scratch",
    method="VisMem",
    title="From rewards alone, tried harder",
    setting=(
        "Stage I without a warm start, on the long memory alone (120 steps, so twice as many for it as in "
        "`vismem-memory`). *Denser*: every scored fact is rewarded by itself, with 64 draws, where the paper rewards a "
        "whole trajectory (16 there). *As the base's own reading*: the former runs on the prompt's input embeddings, "
        "and its slots begin as the names of the cells, behind which a base tells their digits; what it forms is then "
        "what the base reads, before any training. Everything else is as in `vismem-memory`."
    ),
    cell=read_cell,
    rows=(
        TableRow("base", "base", same_as=("pvm-length", "base")),
        TableRow("warm", "from the warm start (ours), for comparison", same_as=("vismem-memory", "long")),
        TableRow(
            "cells",
            "no training: the former as the base's own reading",
            {"plan": {**DENSE, "start": "cells", "steps": 1, "lr": 0.0}, "config": TOKENS},
        ),
        TableRow(
            "cells_other",
            "the same, latents of another image",
            {"plan": {**DENSE, "start": "cells", "steps": 1, "lr": 0.0}, "config": TOKENS, "content": "other"},
        ),
        *(
            row
            for name, (label, settings) in TRIES.items()
            for row in (
                TableRow(name, label, settings),
                TableRow(f"{name}_other", "the same, latents of another image", {**settings, "content": "other"}),
            )
        ),
    ),
    columns=(
        Column("32", "32"),
        Column("512", "512"),
        Column(FAR, "1,024"),
        Column(f"follows_{FAR}", "other image's answers at 1,024"),
    ),
    claims=(
        Claim(
            "Given a former that begins as the base's own reading, a denser reward and larger groups, stage I learns "
            "to form memories from rewards alone.",
            f"{PAPER}, two-stage training; a start of ours",
            ("base", "warm", "cells", "cells_other", "reading", "reading_other"),
            _learns("reading"),
        ),
        Claim(
            "A denser reward and larger groups alone are enough for that.",
            "ours",
            ("base", "warm", "dense", "dense_other"),
            _learns("dense"),
        ),
    ),
    settings={**READING, "lengths": [32, 512, 1024], "content": "own", "kind": "long"},
    seeds=(0, 1, 2),
)

STUDIES = (SCRATCH,)
