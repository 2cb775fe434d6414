"""Pretraining: the same seed gives the same bits, and what is written is a checkpoint."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from keepsight.lab.narration import make_narrations
from keepsight.lab.pretraining import PRETRAINING_RECORD, PretrainConfig, jumping_positions, pretrain
from keepsight.lab.reference import build_model, build_processor

FEW = {"align_steps": 2, "dense_steps": 4, "short_steps": 3}


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "first"
    seen = []
    record = pretrain(folder, PretrainConfig(seed=3, **FEW), lambda *event: seen.append(event))
    return folder, record, seen


def test_the_same_seed_gives_the_same_bits(first, tmp_path):
    torch.manual_seed(99)  # the global generator plays no part
    torch.set_num_threads(2)  # nor does the number of threads
    state = torch.get_rng_state()
    pretrain(tmp_path / "second", PretrainConfig(seed=3, **FEW))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(state, torch.get_rng_state())
    assert digest(first[0]) == digest(tmp_path / "second")
    pretrain(tmp_path / "other", PretrainConfig(seed=4, **FEW))
    assert digest(first[0]) != digest(tmp_path / "other")


def test_it_says_what_it_did(first):
    folder, record, seen = first
    assert json.loads((folder / PRETRAINING_RECORD).read_text()) == record
    assert record["config"]["seed"] == 3
    assert 0 <= record["short_accuracy"] <= 1
    assert [stage for stage, done, _ in seen if done == 1] == ["align", "dense", "short"]
    assert seen[-1] == ("short", 3, 3)
    AutoModelForImageTextToText.from_pretrained(folder)


def test_positions_jump_between_facts_only():
    model, processor = build_model(0), build_processor()
    batch = make_narrations(processor, [2] * 6, 2, "train", np.random.default_rng(0))
    positions = jumping_positions(model, batch, np.random.default_rng(1), 3000)
    steps = positions[0, 0, batch.start :].diff()
    starts = (batch.answers[:-1] + 2 - batch.start - 1).tolist()
    assert all(step == 1 for index, step in enumerate(steps.tolist()) if index not in starts)
    assert any(steps[index] > 1 for index in starts)
    assert (positions[0] == positions[1])[:, batch.start :].all()
