"""Resolve a memory's configuration on a base and count parameters, from config.json alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from keepsight.backbone import Backbone
from keepsight.checkpoints.bases import base_config
from keepsight.pvm import PvmConfig
from keepsight.pvm.branch import make_block


@dataclass(frozen=True)
class MemoryPlan:
    """A base and the memory it would get.

    Attributes:
        backbone: the base on the meta device.
        pvm: the resolved configuration.
        memory_parameters: parameters of all blocks together.
        base_parameters: parameters of the base.
    """

    backbone: Backbone
    pvm: PvmConfig
    memory_parameters: int
    base_parameters: int


def plan_memory(source: str | Path, pvm: PvmConfig | None = None) -> MemoryPlan:
    """Resolve a memory's configuration on a base and count its parameters.

    Raises:
        ValueError: if layers or sizes do not fit the base.
    """
    config = base_config(source)
    pvm = copy.deepcopy(pvm) if pvm is not None else PvmConfig()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        backbone = Backbone.of(model)
        pvm.resolve(backbone)
        block = make_block(pvm)
    per_block = sum(p.numel() for p in block.parameters())
    return MemoryPlan(backbone, pvm, per_block * len(pvm.layers or ()), sum(p.numel() for p in model.parameters()))
