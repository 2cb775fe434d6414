"""Forgetting: what becomes of a model when VisMem's low-rank adapter is not kept apart from it.

The words between two facts say nothing about the image: how well they are predicted is the lab's measure of language.
The contrast: the long-term former's adapter acts in formations only, or in every pass, as in VisMem's code. Beside it,
what training the language model itself costs its language.
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
from studies.pvm.cells import narration_base, refined, trained_by
from studies.pvm.studies import METHOD_LABELS, training_of
from studies.vismem.cells import with_memory

SHORT, LONG = 128, 1024


def forgetting_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """Text and reading, without a memory written.

    Settings: `method`: "base", "vismem", or a method of `keepsight.lab.experiments`; `plan` of its training, and
    `target`, `refine` as for `train_cell`; `isolated`: whether the long-term former's adapter acts in formations only,
    of which there are none here.

    Values:
        `text_<length>`: nats per filler word of narrations of that length; `read_<length>`: accuracy.
    """
    shared: Any = contextlib.nullcontext
    if settings["method"] == "base":
        model, processor = narration_base(bench, seed)
    elif settings["method"] != "vismem":
        base, processor = narration_base(bench, seed)
        trained, plan = trained_by(bench, settings, base, processor, seed)
        model = trained.model
        if "refine" in settings:
            refined(bench, settings, model, processor, plan, seed)
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
    sure = results.difference("shared", "base", f"text_{SHORT}").low > 0
    return judged(
        leak[SHORT].high < 0 and same.low == same.high == 0,
        f"Adapter in every pass minus in formations only: reading {leak[SHORT].points()} at {SHORT} tokens, "
        f"{leak[LONG].points()} at {LONG:,}. Text, in nats per word over the base: {text['shared']} in every pass, "
        f"{text['isolated']} in formations only."
        + ("" if sure else " (The reading decides; the text alone does not.)"),
    )


TUNED = ("lora", "lora_long", "sft")
REWARDED: dict[str, Any] = {
    "method": "lora",
    "plan": {**training_of("lora")["plan"], "warmup_steps": 0, "steps": 1, "lora_lr": 0.0},
    "refine": {"steps": 80, "lr": 3e-4, "adapters_only": True},
}
"""A LoRA that learns from rewards alone, from the base on, as stage II trains one with `--train lora`."""


def _language(results: Results) -> Judgement:
    rows = (*TUNED, "rewarded", "pvm")
    text = {row: results.difference(row, "base", f"text_{LONG}") for row in rows}
    near = ", ".join(f"{row} {_nats(results, row, f'text_{SHORT}')}" for row in rows)
    far = ", ".join(f"{row} {_nats(results, row, f'text_{LONG}')}" for row in rows)
    return judged(
        all(text[row].low > 0 for row in (*TUNED, "rewarded")),
        f"Nats per word over the base at {SHORT} tokens: {near}; at {LONG:,}: {far}. Above zero is forgetting. "
        "Supervised training goes on predicting these words (a tenth of its loss); rewards do not. (Holds if all but "
        f"PVM are surely above the base at {LONG:,}.)",
    )


FORGETTING = Study(
    name="forgetting",
    method="both",
    title="Forgetting: an adapter that is not kept apart, and training the language model",
    setting=(
        "How well the words between the facts, which say nothing about the image, are predicted (nats per word, less "
        "is better), beside the reading. The trained memories of `vismem-memory`, and no memory is written: with its "
        "adapters isolated VisMem is the base, bit for bit; the row behind it leaves the long-term former's adapter on "
        "in every pass, as VisMem's published code does. Then what training itself does to the words: the recipes of "
        "`pvm-length`, and a LoRA that learns from rewards alone (80 updates of GRPO on the answers, rate 3e-4, no KL "
        "term), which is what stage II's `--train lora` does to the policy."
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
        *(TableRow(method, METHOD_LABELS[method], training_of(method)) for method in TUNED),
        TableRow("rewarded", "LoRA, from rewards alone (GRPO)", REWARDED),
        TableRow("pvm", METHOD_LABELS["pvm"], training_of("pvm")),
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
        Claim(
            "Training the language model itself, or a LoRA on it, costs it language.",
            "ours (forgetting)",
            ("base", *TUNED, "rewarded", "pvm"),
            _language,
        ),
    ),
    settings={"lengths": [SHORT, LONG], "rows": 40, "split": "test"},
    seeds=(0, 1, 2),
)
STUDIES = (FORGETTING,)
