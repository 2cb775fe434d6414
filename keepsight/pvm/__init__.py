"""PVM, persistent visual memory: a light branch beside the feed-forward network that looks at the image alone."""

from typing import Any

from peft.utils import PeftType, register_peft_method


def _register() -> None:
    """Make PVM a PEFT method.

    PEFT's list of methods is a closed enum, so the member is added first; the rest is PEFT's own registration.
    """
    if "PVM" in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, "PVM")
    member._name_, member._value_, member._sort_order_ = "PVM", "PVM", len(PeftType)
    member.__objclass__ = PeftType
    type.__setattr__(PeftType, "PVM", member)
    PeftType._member_names_.append("PVM")
    PeftType._member_map_["PVM"] = PeftType._value2member_map_["PVM"] = member
    from keepsight.pvm.config import PvmConfig
    from keepsight.pvm.tuner import PvmModel

    register_peft_method(name="pvm", config_cls=PvmConfig, model_cls=PvmModel)


_register()

from keepsight.pvm.config import PvmConfig  # noqa: E402
from keepsight.pvm.memory import replace_memory, swap_memory  # noqa: E402
from keepsight.pvm.tuner import memory_off  # noqa: E402

__all__ = ["PvmConfig", "memory_off", "replace_memory", "swap_memory"]
