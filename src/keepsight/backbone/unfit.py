"""The VLMs that have no row: which cannot have a memory and why, and what stands in the way of others."""

from __future__ import annotations

_ENCODER_DECODER = (
    "It is an encoder-decoder; a memory stands beside the layers of a decoder that reads images and text alike."
)
_MIXED_INSIDE = (
    "Its images are put among the words inside of its language model, behind the place where a memory reads what "
    "enters it."
)
_BY_ITSELF = (
    "Its generate(...) hands the embeddings to its language model by itself, past the model's own forward, where a "
    "memory learns what is an image."
)
_STREAMS = (
    "Its decoder carries several streams side by side and mixes them around every layer, so there is no one residual "
    "stream that a memory could be added to."
)

#: `config.model_type` of transformers' VLMs that cannot have a memory -> why, as a sentence.
UNFIT: dict[str, str] = {
    "mllama": (
        "Llama 3.2 Vision's images enter through cross-attention in some decoder layers, not as input embeddings, so "
        "there are no visual embeddings in the decoder's input for a memory to keep."
    ),
    "idefics": (
        "IDEFICS' images enter through cross-attention between its decoder's layers, not as input embeddings, so there "
        "are no visual embeddings in the decoder's input for a memory to keep. Idefics2 and Idefics3 can have one."
    ),
    "qwen2_5_omni": (
        "What can have one is its thinker: load Qwen2_5OmniThinkerForConditionalGeneration from the same checkpoint."
    ),
    "qwen3_omni_moe": (
        "What can have one is its thinker: load Qwen3OmniMoeThinkerForConditionalGeneration from the same checkpoint."
    ),
    **dict.fromkeys(
        ("florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"), _ENCODER_DECODER
    ),
    **dict.fromkeys(("chameleon", "git", "kosmos-2", "kosmos-2.5", "phi4_multimodal"), _MIXED_INSIDE),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _BY_ITSELF),
    "blip": (
        "BLIP's images enter through cross-attention in its text decoder's layers, not as input embeddings, so there "
        "are no visual embeddings in the decoder's input for a memory to keep."
    ),
    "nemotron_h_omni": (
        "Each layer of its decoder is a token mixer or a feed-forward network, not both, and the latter are not told "
        "what the decoder was given, by which a memory comes to them."
    ),
    "glm_image": "It makes images.",
    "granite4_vision": (
        "Its visual embeddings are added between its decoder's layers, and zeros stand in the decoder's input, so that "
        "there is nothing for a memory to keep."
    ),
    **dict.fromkeys(("gemma3n", "glm5_next", "hy_v4_vl", "qwen4_exp"), _STREAMS),
    **dict.fromkeys(
        ("inkling2", "inkling2_loop"),
        "Its decoder's feed-forward networks read a mixture of what earlier layers made, not one residual stream.",
    ),
    "pi0": "It answers with the movements of a robot, not with text.",
    "evolla": "It reads proteins, not images.",
    "mistral4": "It is a language model, without images.",
    "diffusion_gemma": "It writes all words at once, by diffusion; a memory is looked at word by word.",
}

_REMOTE = (
    "Its code lies beside its weights and would have to be trusted (trust_remote_code), which keepsight does not do: "
    "it works on models that transformers has itself."
)
#: `config.model_type` of VLMs whose code is not in transformers -> what to take instead, as a sentence; or nothing.
REMOTE: dict[str, str] = {
    "kimi_vl": "Of Moonshot's VLMs, transformers has Kimi-K2.5.",
    "minicpmv": "Of MiniCPM-V, transformers has 4.6.",
    "minicpmo": "Of MiniCPM's VLMs, transformers has MiniCPM-V 4.6.",
    "ovis": "Of Ovis, transformers has Ovis2, as checkpoints that end in -hf.",
    "ovis2_5": "Of Ovis, transformers has Ovis2, as checkpoints that end in -hf.",
    "deepseek_vl_v2": "Of DeepSeek-VL, transformers has the first, as deepseek-community/deepseek-vl-1.3b-chat.",
    "multi_modality": "Of DeepSeek-VL, transformers has checkpoints of deepseek-community, not those of deepseek-ai.",
    "internvl_chat": "Take the same model's checkpoint that ends in -hf: transformers has InternVL itself.",
    "llava_qwen": "Take the same model's checkpoint that ends in -hf: transformers has LLaVA-OneVision itself.",
    "llava_llama": "Take the same model's checkpoint that ends in -hf: transformers has LLaVA itself.",
    "phi3_v": "",
    "phi4mm": "",
    "molmo": "",
    "qwen": "Of Qwen's VLMs, transformers has Qwen2-VL and what came after it.",
}

#: VLMs of transformers 5.24 that have no row yet -> what stands in the way, as a sentence.
PENDING: dict[str, str] = {
    "llama4": (
        "Llama 4's own forward fails in transformers 5.24 (it asks its language model's output for image_outputs, "
        "which that has not), so no memory could be tested on it."
    ),
    "inkling_mm_model": (
        "A memory on it answers, and its convolutions carry a state between samples that are packed into one row, "
        "which is not refused yet."
    ),
    "minicpmv4_7": (
        "A memory on it answers, and not in a server's batch: images have positions that go back within a row, which "
        "keepsight takes for several samples in one row."
    ),
}


def why_unfit(model_type: str) -> str | None:
    """Why a VLM that is known by name has no row, as sentences; None where it is not known."""
    if model_type in UNFIT:
        return UNFIT[model_type]
    if model_type in REMOTE:
        return f"{_REMOTE} {REMOTE[model_type]}".rstrip()
    if model_type in PENDING:
        return f"transformers has it, and keepsight has no row for it yet. {PENDING[model_type]}"
    return None


def why_remote() -> str:
    """Why a model whose code is not in transformers is none of ours."""
    return _REMOTE
