"""QLoRA (arXiv 2305.14314): a base held in four bits through bitsandbytes, while something beside it is trained.

Only the linear maps of the decoder's layers are packed: NF4 with double quantisation, 0.516 bytes a weight. The vision
encoder and projector (a memory is made of what they see), the embeddings and the head (VisMem's tokens are rows of
both) stay as they are stored, and so does what bitsandbytes cannot pack, the experts of a mixture. What is learned is
kept in float32. The papers train on whole bases; this is for one small GPU, and ours.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_bitsandbytes_available

from keepsight.backbone import Backbone
from keepsight.checkpoints.bases import base_config, meta_model
from keepsight.checkpoints.load import load
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.installed import MissingExtraError
from keepsight.train.run.engines import Engine
from keepsight.train.run.learner import PolicyChoice, lora_targets

BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a packed weight: its four bits, an 8-bit scale for every 64, and a float32 scale of 256 of those."""


def check_four_bit(
    source: str | Path, asked: bool, engine: Engine, policy: PolicyChoice = "none", controls: tuple[str, ...] = ()
) -> None:
    """Refuse what cannot be trained on a base in four bits, whether that is asked for or how the base is stored.

    Args:
        source: the base.
        asked: `--load-in-4bit`.
        engine: what launched the processes.
        policy: what of the language model is trained.
        controls: names of the controls.

    Raises:
        KeepsightError: naming what can.
        ImportError: if bitsandbytes is missing.
    """
    stored = stored_packed(source)
    if not asked and not stored:
        return
    how = "--load-in-4bit" if asked else f"{source}, which is stored quantised,"
    if policy == "full":
        raise KeepsightError(
            f"{how} with --policy full: packed weights cannot learn. Train a LoRA on them (--policy lora) or the "
            "memory alone (--policy none)" + (", or leave --load-in-4bit out." if asked else ".")
        )
    if "sft" in controls:
        raise KeepsightError(
            f"{how} with --control sft, which trains the whole language model: packed weights cannot learn. "
            "Leave sft out; lora and none are trained on the same base in four bits."
        )
    if engine.shards_weights:
        raise KeepsightError(
            f"{how} with {engine.name}: packed weights cannot be spread over processes. Launch with "
            "recipes/accelerate/ddp.yaml, where every process holds the whole base, or spread the base unpacked."
        )
    if (asked or stored == "bitsandbytes") and not is_bitsandbytes_available():
        raise MissingExtraError(f"{how} needs bitsandbytes, 0.46.1 or newer.", "4bit")
    if asked and stored:
        warnings.warn(
            f"--load-in-4bit has no effect: {source} is stored quantised, and is read as it is.",
            KeepsightWarning,
            stacklevel=3,
        )


def stored_packed(source: str | Path) -> str | None:
    """The method ("bitsandbytes", ...) by which a base is stored quantised, or None."""
    found = getattr(base_config(source), "quantization_config", None)
    if found is None:
        return None
    return str((found if isinstance(found, dict) else found.to_dict()).get("quant_method"))


def four_bit(source: str | Path, compute: torch.dtype = torch.bfloat16) -> Any:
    """How a base is read in four bits: `keepsight.load(source, quantization_config=four_bit(base))`.

    Args:
        source: the plain base; its config.json will do.
        compute: dtype that packed weights are unpacked to and multiplied in.

    Returns:
        A `transformers.BitsAndBytesConfig`.
    """
    from transformers import BitsAndBytesConfig

    backbone = Backbone.of(meta_model(base_config(source)))
    whole = (backbone.vision_tower, backbone.projector, backbone.model.get_output_embeddings())
    kept = [name for name, module in backbone.model.named_modules() if any(module is part for part in whole)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=kept,
    )


def load_base(
    source: str | Path, base: str | Path, settings: Any, dtype: str, device: str, trainable: bool = False
) -> tuple[Any, Any]:
    """`keepsight.load` for training: where the settings say so, with the base in four bits.

    Args:
        source: what to load: the plain base, or an adapter on it.
        base: the plain base.
        settings: with `load_in_4bit`, `attention` and `on_gpu`.
        dtype: of the base; of what is not packed, where it is packed.
        device: to read it to.
        trainable: leave an adapter's gradients on.

    Returns:
        (model, processor).
    """
    kernel = {} if settings.attention is None else {"attn_implementation": settings.attention}
    if not settings.load_in_4bit or stored_packed(base):
        model, processor = load(source, dtype=dtype, device=device, trainable=trainable, **kernel)
    else:
        if dtype == "auto":
            dtype = "bfloat16" if getattr(settings, "uses_bf16", settings.on_gpu) else "float32"
        # One dtype for all: bitsandbytes would cast the frozen biases of packed layers to the other for good.
        packing = four_bit(base, getattr(torch, dtype))
        model, processor = load(
            source, dtype=dtype, device_map={"": device}, quantization_config=packing, trainable=trainable, **kernel
        )
    for module in model.modules():
        # In evaluation on a CPU, bitsandbytes rearranges packed weights in place and rounds their scales to bfloat16:
        # training would go on with another base than it began with.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, processor


def packed_weights(backbone: Backbone) -> int:
    """How many weights `four_bit` packs: those of the linear maps of the decoder's layers."""
    return sum(backbone.model.get_submodule(name).weight.numel() for name in lora_targets(backbone))


@contextlib.contextmanager
def trainable_as_it_is(model: Any) -> Iterator[None]:
    """While a trainer of TRL is made for a model on a packed base: it leaves dtypes and values as they are.

    TRL rounds all that is trained to bfloat16 there, as QLoRA did. A memory that a first stage has trained would be
    another one then, and a gate near 0.5 could not move by less than 0.002. And transformers takes no packed base
    without an adapter, also where it is only evaluated (the control "none").
    """
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    alone = getattr(model, "is_quantized", False) and not before
    if alone:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
        if alone:
            del model._hf_peft_config_loaded
