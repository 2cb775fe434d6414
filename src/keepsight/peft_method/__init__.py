"""What every memory shares as a method of PEFT: its place in the list, its config, its off switch and its tuner."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from transformers import PreTrainedModel

from keepsight import card
from keepsight.compat import before_upload
from keepsight.peft_method.branch import MemoryBranch, memory_off
from keepsight.peft_method.config import MemoryConfig, config_from_adapter, refuse_unknown_keys
from keepsight.peft_method.tuner import MemoryTuner, refuse_adapter_names

__all__ = [
    "MemoryBranch",
    "MemoryConfig",
    "MemoryTuner",
    "add_peft_type",
    "config_from_adapter",
    "memory_off",
    "refuse_adapter_names",
    "refuse_unknown_keys",
]


def add_peft_type(name: str) -> None:
    """Add a member to PEFT's closed list of methods; the rest is PEFT's own `register_peft_method`."""
    if name in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member


def _finish_cards(folder: Path) -> None:
    """The cards of the memories in what is sent: transformers has put a template of its own over them."""
    for file in folder.rglob("adapter_config.json"):
        saved = json.loads(file.read_text(encoding="utf-8"))
        kind = PEFT_TYPE_TO_CONFIG_MAPPING.get(saved.get("peft_type"))
        if kind is not None and issubclass(kind, MemoryConfig):
            card.finish(file.parent, config_from_adapter(kind, saved))


before_upload((PeftModel, PreTrainedModel, MemoryConfig), card.publishing, _finish_cards)
