"""PVM, persistent visual memory: a light branch beside the feed-forward network that looks at the image alone."""

from peft.utils import PeftType, register_peft_method

from keepsight.peft_method import add_peft_type, memory_off


def _register() -> None:
    """Make PVM a method of PEFT."""
    if "PVM" in PeftType.__members__:
        return
    add_peft_type("PVM")
    from keepsight.pvm.config import PvmConfig
    from keepsight.pvm.tuner import PvmModel

    register_peft_method(name="pvm", config_cls=PvmConfig, model_cls=PvmModel)


_register()

from keepsight.pvm.cache import swap_memory  # noqa: E402
from keepsight.pvm.config import PvmConfig  # noqa: E402
from keepsight.pvm.scope import replace_memory, visual_positions  # noqa: E402

__all__ = ["PvmConfig", "memory_off", "replace_memory", "swap_memory", "visual_positions"]
