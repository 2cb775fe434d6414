"""Hallucination: a model writes freely, and what it names is looked up in the image.

With the memory of its own image, of another one, with noise, and without. A named digit that stands nowhere in the
image is an absent object; the place of a digit may be wrong besides. What could notice it at run time is asked as well:
whether the model, without its memory, would have put another digit in the same place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.evaluation import question_batches
from keepsight.lab.narration import DIGITS, EOS, TOKEN, Narrations
from keepsight.lab.study.results import Judgement, Results, judged
from keepsight.lab.study.study import Bench, Claim, Column, Measured, Study, TableRow
from keepsight.pvm import replace_memory
from studies.pvm.cells import narration_base
from studies.pvm.studies import training_of
from studies.vismem.cells import put_pvm_beside, with_memory
from studies.vismem.reading import Reading, decision_column, noise_like

NEAR, FAR = 32, 1024
_CELL0, _DIGIT0 = TOKEN[CELLS[0]], TOKEN[DIGITS[0]]


def hallucination_cell(bench: Bench, settings: dict[str, Any], seed: int) -> Measured:
    """What a model names in text that it writes by itself, behind narrations of several lengths.

    Settings: `lengths`, `rows`, `split`, `words` (tokens to write), `temperature`; `memory`: "pvm", "short" or "long";
    `content`: "own", "other", "noise" or "none"; `plan` of the memory's training.

    Values:
        for each length: `absent_<length>`, of all statements, the share that names a digit which stands nowhere in the
        image; `wrong_`: not in that cell; `other_`: right for the other image; `stated_`: statements per output;
        `caught_`, `alarm_`: of wrong and of right statements, the share where the model without the memory puts
        another digit in that cell. A share of nothing is left out.
    """
    memory, content = settings["memory"], settings["content"]
    if memory == "pvm":
        base, processor = narration_base(bench, seed)
        model = put_pvm_beside(bench, settings["plan"], base, seed)
    else:
        model, processor, _ = with_memory(bench, settings | {"untrained": content == "none"}, seed)
    generator = torch.Generator().manual_seed(seed + 50)
    values: dict[str, float] = {}
    for length in settings["lengths"]:
        bench.report(f"writing behind {length:,} tokens", 0.9)
        found = []
        for batch in question_batches(processor, length, settings["rows"], seed, settings["split"]):
            if memory == "pvm":
                ids = _write_with_pvm(model, batch, content, settings, generator)
                with model.disable_adapter():
                    found.append(statements(batch, ids, _digits(model, batch, ids)))
            else:
                ids = _write_with_latents(model, batch, memory, content, settings, generator)
                found.append(statements(batch, ids, _digits(model, batch, ids)))
        values |= {f"{name}_{length}": value for name, value in _shares(found, settings["rows"]).items()}
    return Measured(values, settings["rows"], {})


@torch.no_grad()
def _write_with_latents(
    model: Any, batch: Narrations, kind: str, content: str, settings: dict[str, Any], generator: torch.Generator
) -> torch.Tensor:
    reading = Reading(model, batch, decision_column(batch))
    if content != "none":
        reading.invoke(kind)
        latents = reading.form(kind)
        if content == "other":
            latents = latents.roll(1, 0)
        elif content == "noise":
            latents = noise_like(latents, generator)
        reading.splice(kind, latents)
    return reading.write(settings["words"], settings["temperature"], generator, banned=(TOKEN[EOS],))


@torch.no_grad()
def _write_with_pvm(
    model: Any, batch: Narrations, content: str, settings: dict[str, Any], generator: torch.Generator
) -> torch.Tensor:
    def change(embeds: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        if content == "other":
            return embeds.roll(1, 0)
        return noise_like(embeds, generator) if content == "noise" else embeds

    column = decision_column(batch)
    inputs = continued(batch, batch.input_ids[:, :column])
    with replace_memory(change), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        written = model.generate(
            **inputs,
            do_sample=True,
            temperature=settings["temperature"],
            top_k=0,
            min_new_tokens=settings["words"],
            max_new_tokens=settings["words"],
        )
    return written[:, column:]


def continued(batch: Narrations, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Model inputs of a batch whose text is `ids` [B, T] from the first token on."""
    inputs = batch.model_inputs() | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    inputs["mm_token_type_ids"][:, : batch.start] = types[:, : batch.start]
    return inputs


@torch.no_grad()
def _digits(model: Any, batch: Narrations, written: torch.Tensor) -> torch.Tensor:
    """Behind every written token, the digit that the model would write next, by its plain forward: [B, n]."""
    ids = torch.cat([batch.input_ids[:, : decision_column(batch)], written], 1)
    logits = model(**continued(batch, ids), use_cache=False, logits_to_keep=written.shape[1]).logits
    return logits[..., _DIGIT0 : _DIGIT0 + len(DIGITS)].argmax(-1)


def statements(batch: Narrations, written: torch.Tensor, without: torch.Tensor) -> dict[str, torch.Tensor]:
    """What written ids [B, n] say, one entry for every cell that a digit follows.

    Args:
        batch: whose images they are about.
        written: ids.
        without: the digit that would follow each of them without the memory [B, n].

    Returns:
        bool [S] each: `absent`, `wrong`, `other`, `differs`.
    """
    cell, digit = written[:, :-1] - _CELL0, written[:, 1:] - _DIGIT0
    said = (cell >= 0) & (cell < len(CELLS)) & (digit >= 0) & (digit < len(DIGITS))
    row, at = said.nonzero(as_tuple=True)
    cell, digit = cell[row, at], digit[row, at]
    return {
        "absent": (batch.digits[row] != digit[:, None]).all(1),
        "wrong": batch.digits[row, cell] != digit,
        "other": batch.digits.roll(1, 0)[row, cell] == digit,
        "differs": without[row, at] != digit,
    }


def _shares(found: list[dict[str, torch.Tensor]], rows: int) -> dict[str, float]:
    every = {name: torch.cat([part[name] for part in found]) for name in found[0]}
    wrong, differs = every["wrong"], every["differs"]
    shares = {name: every[name] for name in ("absent", "wrong", "other")}
    shares |= {"caught": differs[wrong], "alarm": differs[~wrong]}
    values = {name: float(flags.float().mean()) for name, flags in shares.items() if len(flags)}
    return values | {"stated": len(wrong) / rows}


def _points(results: Results, column: str, *pairs: tuple[str, str]) -> str:
    return "; ".join(f"{a} minus {b} {results.difference(a, b, column).points()}" for a, b in pairs)


def _invents(results: Results, memories: tuple[str, ...]) -> Judgement:
    pairs = [(f"{m}_other", m) for m in memories]
    gaps = [results.difference(a, b, f"absent_{NEAR}") for a, b in pairs]
    names = "; ".join(
        f"{a}: {results.at(a, f'wrong_{NEAR}').percent()} wrong, {results.at(a, f'other_{NEAR}').percent()} right for "
        "the other image"
        for a, _ in pairs
    )
    return judged(
        all(gap.low > 0 for gap in gaps),
        f"Behind {NEAR} tokens, statements that name an absent digit: {_points(results, f'absent_{NEAR}', *pairs)}. "
        f"Of the statements, {names}. Behind {FAR:,} tokens: {_points(results, f'absent_{FAR}', *pairs)}.",
    )


def _prevents(results: Results) -> Judgement:
    pairs = [(m, "none") for m in ("pvm", "short", "long")]
    gaps = [results.difference(a, b, f"absent_{FAR}") for a, b in pairs]
    return judged(
        all(gap.high < 0 for gap in gaps),
        f"Behind {FAR:,} tokens, statements that name an absent digit: {_points(results, f'absent_{FAR}', *pairs)}; "
        f"wrong statements: {_points(results, f'wrong_{FAR}', *pairs)}. (Holds if all three do.)",
    )


def _notices(results: Results, memories: tuple[str, ...]) -> Judgement:
    rows = [f"{m}_other" for m in memories]
    gaps = [results.difference(row, row, f"caught_{NEAR}", f"alarm_{NEAR}") for row in rows]

    def shares(row: str, length: int) -> str:
        wrong, right = (results.at(row, f"{name}_{length}").percent() for name in ("caught", "alarm"))
        return f"{wrong} of wrong and {right} of right ones"

    words = "; ".join(f"{row}: {shares(row, NEAR)} (behind {FAR:,}: {shares(row, FAR)})" for row in rows)
    return judged(
        all(gap.low > 0 for gap in gaps),
        f"Statements that the model contradicts without its memory, behind {NEAR} tokens, {words}. The check needs a "
        "base that still sees the image: in long outputs it is the base that is wrong.",
    )


MEMORIES = {"pvm": "PVM with blindfold warm-up (ours)", "short": "VisMem, short", "long": "VisMem, long"}
GROUPS = {"PVM": ("pvm",), "VisMem, short": ("short",), "VisMem, long": ("long",)}
CONTENTS = {"own": "", "other": ", another image's", "noise": ", noise of equal norm"}


def _row(memory: str, content: str) -> TableRow:
    name = memory if content == "own" else f"{memory}_{content}"
    plan = training_of("pvm")["plan"] if memory == "pvm" else {}
    return TableRow(name, MEMORIES[memory] + CONTENTS[content], {"memory": memory, "content": content, "plan": plan})


HALLUCINATION = Study(
    name="hallucination",
    method="both",
    title="What a model names that is not there",
    setting=(
        f"Behind a narration of {NEAR} or {FAR:,} tokens the model writes 60 tokens freely (temperature 0.5); every "
        "cell followed by a digit is a statement, looked up in the image. The decoder sees its own image throughout; "
        "only the memory changes. A digit drawn at random is absent from such an image in 18.5 % of cases. "
        "*Contradicted*: without its memory the model would have put another digit there, the same text given; a "
        "check that a server could make."
    ),
    cell=hallucination_cell,
    rows=(
        TableRow("none", "no memory", {"memory": "long", "content": "none", "plan": {}}),
        *(_row(memory, content) for memory in MEMORIES for content in CONTENTS),
    ),
    columns=(
        Column(f"absent_{NEAR}", f"absent digits, behind {NEAR}"),
        Column(f"wrong_{NEAR}", f"wrong, behind {NEAR}"),
        Column(f"absent_{FAR}", f"absent digits, behind {FAR:,}"),
        Column(f"wrong_{FAR}", f"wrong, behind {FAR:,}"),
        Column(f"caught_{NEAR}", f"wrong ones contradicted, behind {NEAR}"),
        Column(f"alarm_{NEAR}", f"right ones contradicted, behind {NEAR}"),
        Column(f"stated_{NEAR}", "statements an output", percent=False),
    ),
    claims=(
        *(
            Claim(
                f"With another image's memory ({label}) a model names what is not there, although it sees its own.",
                "ours (hallucination)",
                tuple(f"{m}{c}" for m in memories for c in ("", "_other")),
                partial(_invents, memories=memories),
            )
            for label, memories in GROUPS.items()
        ),
        Claim(
            "In long outputs the memory of the own image makes a model name absent things less often.",
            "ours (hallucination)",
            ("none", *MEMORIES),
            _prevents,
        ),
        *(
            Claim(
                f"A run-time check notices it ({label}): with its memory off, the model contradicts a wrong statement "
                "more often than a right one.",
                "ours (hallucination)",
                tuple(f"{m}_other" for m in memories),
                partial(_notices, memories=memories),
            )
            for label, memories in GROUPS.items()
        ),
    ),
    settings={"lengths": [NEAR, FAR], "rows": 40, "split": "test", "words": 60, "temperature": 0.5},
    seeds=(0, 1, 2),
)
STUDIES = (HALLUCINATION,)
