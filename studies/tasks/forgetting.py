"""Forgetting: what becomes of a model when VisMem's low-rank adapter is not kept apart from it.

The words between two facts say nothing about the image: how well they are predicted is the lab's measure of language.
The contrast: the long-term former's adapter acts in formations only, or in every pass, as in VisMem's code.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F

from keepsight.lab.evaluation import accuracy, question_batches
from keepsight.lab.narration import VOCABULARY, Narrations
from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Bench, Claim, Column, Measured, Study, TableRow
from keepsight.vismem import VisMemBranch
from keepsight.vismem.scope import low_rank
from studies.pvm.cells import narration_base
from studies.vismem.cells import with_memory

SHORT, LONG = 128, 1024


def forgetting_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Text and reading, without a memory written.

    Settings: `method`: "base" or "vismem"; `plan` of the memory's training; `isolated`: whether the long-term former's
    adapter acts in formations only, of which there are none here.

    Values:
        `text_<length>`: nats per filler word of narrations of that length; `read_<length>`: accuracy.
    """
    shared: Any = contextlib.nullcontext
    if settings["method"] == "base":
        model, processor = narration_base(bench, seed)
    else:
        model, processor, _ = with_memory(bench, settings, seed)
        if not settings["isolated"]:
            shared = functools.partial(low_rank, VisMemBranch.of(model).active.long_bank)
    model.eval()
    values: dict[str, float] = {}
    for length in settings["lengths"]:
        batches = question_batches(processor, length, settings["rows"], seed, settings["split"])
        losses, right = [], []
        for batch in batches:
            with shared():
                losses.append(filler_loss(model, batch))
            with shared():
                right.append(accuracy(model, [batch]))
        values[f"text_{length}"] = float(torch.cat(losses).mean())
        values[f"read_{length}"] = sum(s.accuracy * s.n for s in right) / sum(s.n for s in right)
    return Measured(values, settings["rows"] * 6, {})


@torch.no_grad()
def filler_loss(model: Any, batch: Narrations) -> torch.Tensor:
    """Nats of every filler word of a batch [n], by the model's plain forward.

    Among words: an invocation token is none, and its share is the memory's to spend.
    """
    logits = model(**batch.model_inputs(), use_cache=False).logits[..., : len(VOCABULARY)]
    at = batch.filler.nonzero().squeeze(1)
    loss = F.cross_entropy(logits[:, at - 1].transpose(1, 2).float(), batch.input_ids[:, at], reduction="none")
    return loss.flatten()


def _nats(results: Results, row: str, column: str) -> str:
    gap = results.difference(row, "base", column)
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def _isolation(results: Results) -> Judgement:
    leak = {n: results.difference("shared", "isolated", f"read_{n}") for n in (SHORT, LONG)}
    same = results.difference("isolated", "base", f"text_{SHORT}")
    text = {row: _nats(results, row, f"text_{SHORT}") for row in ("shared", "isolated")}
    return judged(
        leak[SHORT].high < 0 and same.low == same.high == 0,
        f"Adapter in every pass minus in formations only: reading {leak[SHORT].points()} at {SHORT} tokens, "
        f"{leak[LONG].points()} at {LONG:,}. Text, in nats per word over the base: {text['shared']} in every pass, "
        f"{text['isolated']} in formations only.",
    )


FORGETTING = Study(
    name="forgetting",
    method="VisMem",
    title="An adapter that is not kept apart",
    setting=(
        "How well the words between the facts, which say nothing about the image, are predicted (nats per word, less "
        "is better), beside the reading. The trained memories of `vismem-memory`, and no memory is written: with its "
        "adapters isolated VisMem is the base, bit for bit; the last row leaves the long-term former's adapter on in "
        "every pass, as VisMem's published code does."
    ),
    cell=forgetting_cell,
    rows=(
        TableRow("base", "base", {"method": "base"}),
        TableRow("isolated", "VisMem, not invoked", {"method": "vismem", "isolated": True, "plan": {}}),
        TableRow(
            "shared",
            "the same, the long-term former's adapter on in every pass",
            {"method": "vismem", "isolated": False, "plan": {}},
        ),
    ),
    columns=(
        Column(f"text_{SHORT}", f"nats per word at {SHORT}", percent=False),
        Column(f"text_{LONG}", f"nats per word at {LONG:,}", percent=False),
        Column(f"read_{SHORT}", f"reading at {SHORT}"),
        Column(f"read_{LONG}", f"reading at {LONG:,}"),
    ),
    claims=(
        Claim(
            "A memory's adapter must be kept apart from the base: left on, the base forgets.",
            "VisMem (catastrophic forgetting if LoRA is not isolated)",
            ("base", "isolated", "shared"),
            _isolation,
        ),
    ),
    settings={"lengths": [SHORT, LONG], "rows": 40, "split": "test"},
    seeds=(0, 1, 2),
)
STUDIES = (FORGETTING,)
