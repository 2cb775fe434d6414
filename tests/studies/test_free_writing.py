"""Studies of what a model writes by itself: what is said is looked up, and nothing is invented by the measuring."""

import dataclasses

import pytest
import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.evaluation import question_batches
from keepsight.lab.narration import EOS, STOP, TOKEN
from keepsight.lab.reference import load_reference
from keepsight.lab.study.results import Results
from keepsight.lab.study.study import Bench
from studies.study import choose
from studies.tasks.forgetting import REWARDED, forgetting_cell
from studies.tasks.hallucination import continued, hallucination_cell, statements
from studies.vismem.reading import Reading, attach_vismem, decision_column, lab_config

TINY = {"warm_steps": 2, "warm_batch": 2, "steps": 2, "batch": 2, "group": 4, "shortest": 30, "longest": 40}
TINY_PVM = {"warmup_steps": 2, "steps": 2, "batch": 2}
SETTINGS = {"lengths": [32], "rows": 4, "split": "validation", "words": 24, "temperature": 0.5}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def batch():
    return question_batches(load_reference()[1], 32, 4, 0, "validation")[0]


def test_statements_are_looked_up_in_their_own_image(batch):
    digits = torch.zeros(4, 16, dtype=torch.long)
    digits[1, 2] = 7
    images = dataclasses.replace(batch, digits=digits)
    b = TOKEN[CELLS[2]]
    said = torch.tensor(
        [[b, TOKEN["0"], TOKEN[STOP], b, TOKEN["7"]]] * 2 + [[TOKEN["7"], b, TOKEN[STOP]] * 1 + [0, b]] * 2
    )
    without = torch.zeros_like(said)
    found = statements(images, said, without)
    assert found["wrong"].tolist() == [False, True, True, False]
    assert found["absent"].tolist() == [False, True, False, False]
    assert found["other"].tolist() == [True, False, True, False]
    assert found["differs"].tolist() == [False, True, False, True]


@torch.no_grad()
def test_what_is_written_is_what_generate_writes(batch):
    model, processor = load_reference()
    model = attach_vismem(model, processor, 0, lab_config())
    column = decision_column(batch)
    reading = Reading(model, batch, column)
    written = reading.write(12, 1e-4, torch.Generator().manual_seed(0), banned=(TOKEN[EOS],))
    inputs = continued(batch, batch.input_ids[:, :column])
    expected = model.generate(**inputs, do_sample=False, min_new_tokens=12, max_new_tokens=12, memory="off")
    assert torch.equal(written, getattr(expected, "sequences", expected)[:, column:])


@pytest.mark.parametrize(("memory", "plan"), [("pvm", TINY_PVM), ("long", TINY), ("short", TINY)])
def test_hallucinations_are_counted_alike_every_time(bench, memory, plan):
    settings = {**SETTINGS, "memory": memory, "plan": plan}
    for content in ("own", "other", "noise"):
        first, again = (hallucination_cell(bench, settings | {"content": content}, 0).values for _ in range(2))
        assert first == again
        assert first["stated_32"] > 1
        assert first["absent_32"] <= first["wrong_32"] <= 1


def test_an_isolated_memory_forgets_nothing_and_a_shared_adapter_changes_text(bench):
    settings = {"lengths": [32], "rows": 4, "split": "validation", "plan": TINY}
    base = forgetting_cell(bench, settings | {"method": "base"}, 0).values
    isolated, shared = (
        forgetting_cell(bench, settings | {"method": "vismem", "isolated": alone}, 0).values for alone in (True, False)
    )
    assert isolated == base
    assert shared["text_32"] != base["text_32"]


def test_a_lora_that_learns_from_rewards_starts_as_the_base(bench):
    settings = {"lengths": [32], "rows": 4, "split": "validation", **REWARDED}
    base = forgetting_cell(bench, settings | {"method": "base"}, 0).values
    still, moved = (
        forgetting_cell(bench, settings | {"refine": REWARDED["refine"] | {"steps": 2, "lr": lr}}, 0).values
        for lr in (0.0, 1e-2)
    )
    assert still == base
    assert moved["text_32"] != base["text_32"]


def test_claims_are_judged_from_any_results():
    for study in choose(["hallucination", "forgetting"]):
        values = {column.key: 0.5 for column in study.columns}
        values |= {f"{name}_{n}": 0.5 for name in ("absent", "wrong", "other", "caught", "alarm") for n in (32, 1024)}
        cells = {row.name: {s: {"values": values, "facts": {}, "n": 9} for s in (0, 1)} for row in study.rows}
        results = Results(cells, {row.name: (0, 1) for row in study.rows})
        for claim in study.claims:
            assert set(claim.rows) <= set(cells)
            assert claim.judge(results).because.endswith((".", ".)"))
