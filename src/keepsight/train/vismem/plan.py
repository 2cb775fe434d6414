"""What a latent memory on a given base would be, worked out from the base's configuration alone."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from keepsight.backbone import Backbone
from keepsight.checkpoints.bases import base_config, check_weights
from keepsight.vismem import VisMemConfig


def plan_vismem(source: str | Path, vismem: VisMemConfig | None = None) -> VisMemConfig:
    """Resolve a memory's configuration on a base.

    Raises:
        ValueError: if sizes do not fit the base.
        FileNotFoundError, KeepsightError: if the base is missing or broken.
    """
    config = base_config(source)
    check_weights(source)
    found = copy.deepcopy(vismem) if vismem is not None else VisMemConfig()
    with torch.device("meta"):
        found.resolve(Backbone.of(AutoModelForImageTextToText.from_config(config)))
    return found
