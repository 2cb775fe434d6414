"""A memory that does something and remembers nothing: random weights behind an open gate."""

from __future__ import annotations

import copy
from typing import Any

import torch


def forced_open(model: Any, gate: float = 0.15, seed: int = 0) -> Any:
    """The same memory with random weights and its gates as far open as training opens them."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pvm_" not in name:
                continue
            if name.endswith(".gate"):
                parameter.fill_(gate)
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
    return model
