"""All families, and the error for everything else."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers import __version__ as installed

from keepsight.backbone.families import gemma, llava, others, qwen
from keepsight.backbone.parts import Family
from keepsight.backbone.unfit import why_remote, why_unfit
from keepsight.errors import UnsupportedModelError

#: `config.model_type` -> family.
FAMILIES: dict[str, Family] = {**qwen.ROWS, **llava.ROWS, **gemma.ROWS, **others.ROWS}

_SOUGHT = ("qwen3_vl", "qwen2_5_vl", "qwen3_5", "internvl", "llava_onevision", "llava_next", "gemma3", "glm4v")


def family_of(config: Any, name: str = "The model") -> Family:
    """The family of a model's configuration, known before any weight is read.

    Args:
        config: the model's transformers configuration.
        name: how to call the model in the error.

    Raises:
        UnsupportedModelError: if no row of `FAMILIES` describes it.
    """
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"{name} cannot be given a visual memory: it is no model of transformers (it has no config.model_type). "
            f"Load a vision-language model, for example by keepsight.load. {_supported()}"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} (model_type {model_type!r}) cannot be given a visual memory. {_reason(config, model_type)} "
            f"{_supported()} To ask for another, open an issue at keepsight's repository that names it."
        )
    return FAMILIES[model_type]


def _supported() -> str:
    """Of a list as long as this one, what people look for first."""
    names = ", ".join(FAMILIES[model_type].name for model_type in _SOUGHT)
    return f"Supported: {names} and {len(FAMILIES) - len(_SOUGHT)} other families; docs/families.md has them all."


def _reason(config: Any, model_type: str) -> str:
    """Why a model of transformers is none of the families, as sentences."""
    known = why_unfit(model_type)
    if known is not None:
        return known
    if getattr(config, "auto_map", None):
        return why_remote()
    whole = next((t for t in FAMILIES if model_type.startswith(f"{t}_")), None)
    if whole is not None and not hasattr(config, "vision_config"):
        return f"It is a part of {FAMILIES[whole].name} ({whole}): give the whole model, vision encoder and all."
    if getattr(config, "is_encoder_decoder", False):
        return (
            "It is an encoder-decoder; a memory stands beside the layers of a decoder that reads images and text alike."
        )
    if not any(hasattr(config, part) for part in ("vision_config", "vision_tower", "visual", "vq_config")):
        if model_type not in CONFIG_MAPPING:
            return f"transformers {installed}, which is installed, does not know it either; a newer release may."
        return (
            "It takes no images (its configuration has no vision_config), so there is nothing for a memory to keep: "
            "give a vision-language model."
        )
    return "It takes images, and is none of the model families that keepsight knows."
