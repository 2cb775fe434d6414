"""Which attention kernels a base can run with, told by name before any weight is read. Quick to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from keepsight.errors import KeepsightError

if TYPE_CHECKING:
    import torch

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", "flex"]
"""transformers' names of its kernels, and what is short for one."""
_SHORT = {"flex": "flex_attention"}
_FLASH = {
    "flash_attention_2": "pip install flash-attn",
    "flash_attention_3": "it is built from source (github.com/Dao-AILab/flash-attention, hopper/)",
}


def kernel_named(attention: str | None) -> str | None:
    """A kernel's name as transformers has it."""
    return _SHORT.get(attention or "", attention)


def check_attention(
    source: str | Path,
    attention: str | None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    autocast: bool = False,
    revision: str | None = None,
    trains: bool = False,
) -> None:
    """Refuse a kernel that is not installed, that this device or dtype has not, or that the base's code cannot use.

    transformers would warn of some of these, fall back to another kernel, or fail at the first step.

    Args:
        source: the base; its config.json will do.
        attention: as transformers names it; None is its own choice, which always works.
        device: where the base will run; default: the GPU if there is one.
        dtype: of the base; "auto" is the checkpoint's own.
        autocast: whether matrices are multiplied in 16 bits whatever the dtype.
        revision: of `source`, on the hub.
        trains: whether gradients are needed.

    Raises:
        KeepsightError: naming the kernel and what to write instead.
    """
    if attention is None or attention not in get_args(Attention):  # a kernel of the caller's own: transformers judges
        return
    import torch
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    from keepsight.checkpoints.bases import base_config, meta_model

    config: Any = base_config(source, revision)
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if attention in _FLASH:
        available = is_flash_attn_2_available if attention.endswith("2") else is_flash_attn_3_available
        if kind == "cpu":
            raise KeepsightError(f"{attention} runs on GPUs only, and this would run on a CPU: use --attention sdpa.")
        if not available():
            raise KeepsightError(f"{attention} is not installed: {_FLASH[attention]}. --attention sdpa needs nothing.")
        stored = str(config.dtype if dtype == "auto" else dtype).removeprefix("torch.")
        if stored not in ("float16", "bfloat16") and not autocast:
            raise KeepsightError(
                f"{attention} computes in 16 bits, and the base is {stored}: give --dtype bfloat16, or --attention "
                "sdpa."
            )
    try:
        meta_model(config, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        why = " ".join(str(error).split()).partition(". ")[0]
        raise KeepsightError(
            f"{source} cannot run with {attention}: {why}. Use --attention sdpa, which every family has."
        ) from error
    if attention == "flex_attention" and kind == "cpu" and trains:
        raise KeepsightError(
            "flex_attention has no backward pass on a CPU, so nothing trains with it there: use --attention sdpa."
        )
