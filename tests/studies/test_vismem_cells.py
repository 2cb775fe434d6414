"""VisMem's cells: each memory is trained once, numbers repeat, and reading without memory is reading the base."""

import pytest
import torch

from keepsight.lab.evaluation import accuracy, question_batches
from keepsight.lab.reference import load_reference
from keepsight.lab.study.results import Results
from keepsight.lab.study.study import Bench
from studies.price import PRICE, price_cell
from studies.study import choose
from studies.vismem.cells import policy_cell, read_cell
from studies.vismem.when import when_cell

PLAN = {"warm_steps": 2, "warm_batch": 2, "steps": 2, "batch": 2, "group": 4, "shortest": 30, "longest": 40}
SETTINGS = {"plan": PLAN, "lengths": [32, 40], "rows": 4, "split": "validation", "kind": "short"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("work"))


def test_a_memory_is_trained_once_and_numbers_repeat(bench):
    first = read_cell(bench, {**SETTINGS, "content": "own"}, 0)
    made = {path: path.stat().st_mtime_ns for path in bench.work.rglob("*.safetensors")}
    assert len(made) == 2  # the warm start, and what stage I made of it
    again = read_cell(bench, {**SETTINGS, "content": "own"}, 0)
    assert again.values == first.values
    other = read_cell(bench, {**SETTINGS, "content": "other"}, 0)
    assert {"follows_32", "follows_40"} <= set(other.values)
    assert made == {path: path.stat().st_mtime_ns for path in bench.work.rglob("*.safetensors")}


def test_without_memory_the_base_reads(bench):
    found = read_cell(bench, {**SETTINGS, "content": "none", "untrained": True}, 0)
    never = policy_cell(bench, {**SETTINGS, "untrained": True, "probability": 0.0, "types": ["short"]}, 0)
    model, processor = load_reference()
    with torch.no_grad():
        for length in SETTINGS["lengths"]:
            expected = accuracy(model, question_batches(processor, length, 4, 0, "validation")).accuracy
            assert found.values[str(length)] == never.values[str(length)] == expected
    assert never.values["invocations"] == 0


def test_policies_stay_within_their_bounds(bench):
    settings = {**SETTINGS, "scripts": {"train": 1, "test": 1, "rows": 2, "max_gap": 20}, "split": "test"}
    never, always, hindsight = (
        when_cell(bench, {**settings, "policy": policy, "types": [2]}, 0).values
        for policy in ("never", "always", "hindsight")
    )
    assert never["invocations"] == 0
    assert always["invocations"] == 2
    assert always["long"] == 1
    assert hindsight["score"] >= max(never["score"], always["score"])


def test_claims_are_judged_from_any_results():
    """Every judge makes a sentence of numbers, whatever they are."""
    for study in choose(["vismem"]):
        values = {column.key: 0.5 for column in study.columns}
        facts = {"long": 0.5, **{f"follows_{n}": 0.5 for n in (32, 128, 512, 1024, 2048)}}
        cells = {
            row.name: {s: {"values": values | facts | {"mean": 0.5}, "facts": {}, "n": 9} for s in (0, 1)}
            for row in study.rows
        }
        results = Results(cells, {row.name: (0, 1) for row in study.rows})
        for claim in study.claims:
            assert {study.row(row).name for row in claim.rows} <= set(cells)
            verdict = claim.judge(results)
            assert verdict.word in ("holds", "does not hold", "cannot be tested here")
            assert verdict.because.endswith((".", ".)"))


def test_a_price_is_points_for_operations():
    rows = {row.name for row in PRICE.rows}
    cells = {row: {s: {"values": {"1024": 0.4 + 0.1 * s}, "facts": {}, "n": 9} for s in (0, 1, 2)} for row in rows}
    for row in rows:
        if row.startswith("price_"):
            cells[row] = {0: {"values": {"operations": 4.0}, "facts": {}, "n": 0}}
    for seed, gain in enumerate((0.2, 0.4, 0.6)):
        cells["lora_long"][seed]["values"]["1024"] = 0.4 + 0.1 * seed + gain
    results = Results(cells, {row: tuple(found) for row, found in cells.items()})
    assert results.has(*PRICE.claims[0].rows)
    verdict = PRICE.claims[0].judge(results)
    assert "LoRA trained at the target length +10.0 points [-2.4, +22.4]" in verdict.because  # .1 for 4, by seed
    assert "stage I on top of the warm start +0.0 points" in verdict.because
    assert verdict.word == "does not hold"


def test_operations_are_counted_in_proportion_to_the_batch(bench):
    tiny = {"warmup_steps": 0, "steps": 20, "facts": 2, "max_gap": 0}
    counted = [
        price_cell(bench, {"part": "train", "method": "lora", "plan": {**tiny, "batch": batch}}, 0).values["operations"]
        for batch in (2, 4)
    ]
    assert counted[1] == pytest.approx(2 * counted[0], rel=0.02)
