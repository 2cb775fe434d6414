"""All families, those that cannot have a memory and why, and the error for everything else."""

from __future__ import annotations

from typing import Any

from keepsight.backbone.families import gemma, llava, others, qwen
from keepsight.backbone.parts import Family
from keepsight.errors import UnsupportedModelError

#: `config.model_type` -> family.
FAMILIES: dict[str, Family] = {**qwen.ROWS, **llava.ROWS, **gemma.ROWS, **others.ROWS}

#: `config.model_type` of VLMs that cannot have a memory -> why, as a sentence.
UNFIT: dict[str, str] = {
    "mllama": (
        "Llama 3.2 Vision's images enter through cross-attention in some decoder layers, not as input embeddings, so "
        "there are no visual embeddings in the decoder's input for a memory to keep."
    ),
    "llama4": (
        "Llama 4's own forward fails in transformers 5.24 (it asks its language model's output for image_outputs, "
        "which that has not), so no memory could be tested on it."
    ),
    "qwen2_5_omni": (
        "What can have one is its thinker: load Qwen2_5OmniThinkerForConditionalGeneration from the same checkpoint."
    ),
    "qwen3_omni_moe": (
        "What can have one is its thinker: load Qwen3OmniMoeThinkerForConditionalGeneration from the same checkpoint."
    ),
}


def family_of(config: Any, name: str = "The model") -> Family:
    """The family of a model's configuration, known before any weight is read.

    Args:
        config: the model's transformers configuration.
        name: how to call the model in the error.

    Raises:
        UnsupportedModelError: if no row of `FAMILIES` describes it.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        reason = UNFIT.get(str(model_type), "It is not among the model families that keepsight supports.")
        supported = ", ".join(f"{family.name} ({model_type})" for model_type, family in FAMILIES.items())
        raise UnsupportedModelError(
            f"{name} (model_type {model_type!r}) cannot be given a visual memory. {reason} Supported: {supported}. "
            "Take one of these, or ask for yours: open an issue at keepsight's repository that names the model "
            "(docs/families.md says what a family must have, and what each of them can do)."
        )
    return FAMILIES[model_type]
