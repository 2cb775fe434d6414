"""VisMem, latent vision memory: the model writes an invocation token, and latents of what it sees follow it."""

from peft.utils import register_peft_method

from keepsight.peft_method import add_peft_type


def _register() -> None:
    """Make VisMem a PEFT method."""
    from peft.utils import PeftType

    if "VISMEM" in PeftType.__members__:
        return
    add_peft_type("VISMEM")
    from keepsight.vismem.config import VisMemConfig
    from keepsight.vismem.tuner import VisMemModel

    register_peft_method(name="vismem", config_cls=VisMemConfig, model_cls=VisMemModel)


_register()

from keepsight.vismem.branch import VisMemBranch  # noqa: E402
from keepsight.vismem.config import VisMemConfig  # noqa: E402
from keepsight.vismem.memory import Invocation  # noqa: E402
from keepsight.vismem.processor import add_memory_tokens, decode  # noqa: E402
from keepsight.vismem.scope import replace_latents  # noqa: E402
from keepsight.vismem.tuner import parameter_groups  # noqa: E402
from keepsight.vismem.writing.output import VisMemOutput  # noqa: E402
from keepsight.vismem.writing.policy import MemoryPolicy  # noqa: E402
from keepsight.vismem.writing.rollouts import Replay, RolloutOptions  # noqa: E402
from keepsight.vismem.writing.splicing import splice  # noqa: E402

__all__ = [
    "Invocation",
    "MemoryPolicy",
    "Replay",
    "RolloutOptions",
    "VisMemBranch",
    "VisMemConfig",
    "VisMemOutput",
    "add_memory_tokens",
    "decode",
    "parameter_groups",
    "replace_latents",
    "splice",
]
