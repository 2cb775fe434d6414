"""Gradient checkpointing recomputes what a backward pass needs, and nothing below the lowest layer that learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_training import QUICK
from transformers import TrainerCallback

import keepsight
from keepsight.backbone import Backbone
from keepsight.compat import enable_checkpointing
from keepsight.train.pvm.sft import SftSettings, train_pvm
from keepsight.train.run.trainer import stop_below_learners


class Calls(TrainerCallback):
    """Counts how often the first attention of every decoder layer and vision block runs."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.vision: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        backbone = Backbone.of(model)
        self.layers, self.vision = [0] * len(backbone.layers), [0] * len(backbone.vision_blocks)
        for counts, modules in (
            (self.layers, [Backbone.mixer(layer) for layer in backbone.layers]),
            (self.vision, [block.attn for block in backbone.vision_blocks]),
        ):
            for index, module in enumerate(modules):
                module.register_forward_pre_hook(lambda *_, c=counts, i=index: c.__setitem__(i, c[i] + 1))


@pytest.mark.parametrize(("checkpointing", "above"), [(True, 2), (False, 1)])
def test_nothing_below_the_lowest_block_is_recomputed(
    checkpointing: bool, above: int, tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    calls = Calls()
    train_pvm(
        tiny_vlm,
        data,
        tmp_path / "out",
        pvm=keepsight.PvmConfig(layers=[2], width=32),
        settings=SftSettings(**QUICK | {"max_steps": 3, "gradient_checkpointing": checkpointing}),
        callbacks=[calls],
    )
    assert calls.layers == [3, 3, 3 * above, 3 * above]
    assert calls.vision == [3, 3]


def test_only_the_hooks_that_ask_for_input_gradients_go(family: Any) -> None:
    model = family.build()
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    for _ in range(2):
        enable_checkpointing(model)
    assert stop_below_learners(model) >= 2
    assert stop_below_learners(model) == 0
    assert handle.id in model.get_input_embeddings()._forward_hooks
