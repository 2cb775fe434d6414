"""The tiny models that the peers' tests are run on: classes of transformers that are born with a memory.

`models.model_class(family, memory)` is a subclass of the family's own class, under its name: what a peer's test builds,
saves and loads is the base together with the memory, as if the memory were a part of the architecture.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import transformers
from families import BY_NAME, EOS, PAD, Row, TinyFamily, make_inputs
from peft import inject_adapter_in_model

import keepsight
from keepsight.vismem import VisMemBranch

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
#: "plain" is the base alone: what fails there too says nothing about a memory. "vismem_off" never invokes.
MEMORIES = ("plain", "pvm", "vismem", "vismem_off")
LAYERS = 2  # transformers' testers ask for no more
ROWS = [Row(2, (2, 2), 3, seed=1), Row(2, (2, 2), 3, seed=2)]

_VISMEM: dict[str, Any] = {
    "num_queries": 3,
    "num_short": 2,
    "num_long": 2,
    "query_width": 16,
    "query_heads": 2,
    "short_rank": 4,
    "long_rank": 4,
    "short_dropout": 0.0,
    "long_dropout": 0.0,
}


def memory_config(memory: str) -> Any:
    """A small configuration of a memory that matters; None for the base alone."""
    if memory == "plain":
        return None
    if memory == "pvm":
        return keepsight.PvmConfig(layers=[0, 1], width=32, init_gate=0.7)
    return keepsight.VisMemConfig(**_VISMEM, policy="off" if memory == "vismem_off" else "free")


def base_config(family: TinyFamily) -> Any:
    """The family's tiny configuration, with fewer layers."""
    config = family.config()
    text = config.get_text_config()
    text.num_hidden_layers = LAYERS
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:LAYERS]
    return config


@torch.no_grad()
def open_memory(model: Any) -> None:
    """Make a fresh VisMem one that matters: no part of it is zero."""
    branch = VisMemBranch.find(model)
    if branch is not None:
        for memory in branch.vismem_memory.values():
            for name, parameter in memory.named_parameters():
                if name.endswith(".up") and not parameter.is_meta:
                    parameter.normal_(std=0.3)


@functools.cache
def model_class(name: str, memory: str) -> Any:
    """The class of a family's model that carries a memory from its birth."""
    base: Any = getattr(transformers, BY_NAME[name].model_class)
    config = memory_config(memory)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        if memory != "plain":
            inject_adapter_in_model(memory_config(memory), self)
            open_memory(self)
            self.requires_grad_(True)

    if config is None:
        return base
    # transformers finds what a class can do by its name and module
    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


def inputs_of(name: str, model: Any = None, rows: list[Row] = ROWS) -> dict[str, torch.Tensor]:
    """Inputs of a family: two prompts with an image each."""
    family = BY_NAME[name]
    if model is None:
        model = getattr(transformers, family.model_class)(base_config(family)).eval()
    return make_inputs(family, model, rows)


class TinyTester:
    """What transformers' testers ask of a `model_tester`.

    Args:
        name: the family's.
    """

    is_training = True
    batch_size = len(ROWS)

    def __init__(self, name: str):
        self.family = BY_NAME[name]
        config = self.get_config()
        text = config.get_text_config()
        for size in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
            setattr(self, size, getattr(text, size))
        self.vision_config = config.vision_config.to_dict()
        torch.manual_seed(0)
        self._inputs = inputs_of(name)
        self.seq_length = self._inputs["input_ids"].shape[1]

    def get_config(self) -> Any:
        """A new tiny configuration."""
        return base_config(self.family)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """A new configuration, and inputs that fit it."""
        return self.get_config(), {key: value.clone() for key, value in self._inputs.items()}


def build(name: str, memory: str, seed: int = 0) -> Any:
    """A tiny random model that carries a memory, in eval mode, never at an end of text."""
    torch.manual_seed(seed)
    model = model_class(name, memory)(base_config(BY_NAME[name])).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    assert EOS != PAD
    return model
