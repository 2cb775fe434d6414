"""Two processes train the same memory as one: the same gradients, weights and files, images on every rank or not, with
texts beside the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launching import WEIGHTS, facts, run_jobs, same_gradients, same_weights
from packaging.version import parse
from safetensors.torch import load_file
from tiny_training import make_data, read_rows, write_rows

import keepsight

# One sample per forward, so that every second forward has no image; an open gate, so that every tensor has a gradient.
SETTINGS = {"max_steps": 4, "save_steps": 2, "batch_size": 1, "lr": 1e-3, "text_only": "keep", "device": "cpu"}
# transformers 5.17 loads the optimiser to cpu:0, which torch does not know; 5.23 does not.
CANNOT_RESUME = parse(transformers.__version__) < parse("5.23")


@pytest.fixture(scope="module")
def job(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all runs of this module share: every second sample has no image."""
    data = make_data(tmp_path_factory.mktemp("data") / "data")
    rows = read_rows(data)
    write_rows(data, [row | {"images": []} if index % 2 else row for index, row in enumerate(rows)])
    texts = data.with_name("texts.txt")
    texts.write_text("the light line falls over a quiet canvas . " * 100)
    settings = SETTINGS | {"keep_language": str(texts)}
    return {"base": str(tiny_vlm), "data": str(data), "pvm": {"init_gate": 0.5}, "settings": settings}


@pytest.fixture(scope="module")
def single(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, four samples per step."""
    out = tmp_path_factory.mktemp("single") / "out"
    return run_jobs(out, job | {"output": str(out), "settings": job["settings"] | {"grad_accum": 4}})


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def double(request: pytest.FixtureRequest, job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes with two samples per step each: an unbroken run, and one broken off half-way and resumed."""
    out = tmp_path_factory.mktemp(request.param) / request.param
    job = job | {"settings": job["settings"] | {"grad_accum": 2}}
    unbroken = job | {"output": str(out)}
    resumed = job | {"output": f"{out}-resumed", "resume_from": str(out)}
    jobs = [unbroken] if request.param == "ddp" and CANNOT_RESUME else [unbroken, resumed]
    return run_jobs(out, *jobs, engine=request.param)


def test_gradients_and_weights_are_those_of_one_process(double: Path, single: Path) -> None:
    for name, tensor in same_gradients(double, single, steps=4).items():
        assert tensor.abs().max() > 0, name
    same_weights(double, single)


def test_a_process_without_an_image_kept_step_with_one_that_had_some(double: Path, single: Path) -> None:
    ranks = [_without_texts(facts(double, rank)["saw_image"], batches=2) for rank in (0, 1)]
    assert [len(seen) for seen in ranks] == [8, 8]
    assert sum(one != other for one, other in zip(*ranks, strict=True)) >= 2
    assert facts(double)["sharded"] is double.name.startswith("fsdp")
    assert facts(double)["base_unchanged"] is True
    # The same samples in the same order, dealt out to two.
    dealt = [image for pair in zip(*ranks, strict=True) for image in pair]
    assert dealt == _without_texts(facts(single)["saw_image"], batches=4)


def _without_texts(saw_image: list[bool], batches: int) -> list[bool]:
    """Whether the batches of all steps had an image; in the last two each has a text behind it that is like it."""
    rest, found = iter(saw_image), []
    for step in range(4):
        for _ in range(batches):
            found.append(next(rest))
            if step >= 2:
                assert next(rest) == found[-1]
    assert next(rest, None) is None
    return found


def test_a_run_that_was_broken_off_ends_with_the_same_weights(double: Path) -> None:
    resumed = Path(f"{double}-resumed")
    if double.name == "ddp" and CANNOT_RESUME:
        pytest.skip("this transformers loads the optimiser to cpu:0, which torch does not know")
    assert facts(resumed)["resumed_from"] == 2
    assert facts(resumed)["sharded"] is facts(double)["sharded"]
    weights, expected = load_file(resumed / WEIGHTS), load_file(double / WEIGHTS)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_folder_is_that_of_one_process(double: Path, single: Path) -> None:
    assert {path.name for path in double.iterdir()} == {path.name for path in single.iterdir()}
    for file in ("adapter_config.json", "tokenizer_config.json", "processor_config.json"):
        assert (double / file).read_text() == (single / file).read_text()
    model, _ = keepsight.load(double)
    stored = load_file(double / WEIGHTS)
    loaded = {name: p for name, p in model.named_parameters() if ".pvm_blocks.default." in name}
    assert len(loaded) == len(stored)
    for name, parameter in loaded.items():
        assert torch.equal(parameter, stored[name.replace(".default.", ".")]), name
