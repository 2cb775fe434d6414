"""The reference VLM: a model of 0.64 M parameters of the Qwen3-VL architecture that reads grids of handwritten digits.

It is an ordinary checkpoint folder (config, processor, tokenizer, 16-bit safetensors) which
`AutoModelForImageTextToText` and `AutoProcessor` load; `keepsight lab pretrain` makes one from nothing, and one is
shipped as package data. Importing this file needs only torch and transformers, because
`keepsight.load("keepsight/reference")` must work without the `lab` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keepsight.modes import readable
from keepsight.shipped import REFERENCE_NAME, reference_path

__all__ = ["REFERENCE_NAME", "build_model", "build_processor", "load_reference", "reference_path", "save_reference"]

HEAD_DIM = 16
"""Width of an attention head. Queries and keys are normalised per head, so a logit is at most about sqrt(head_dim):
narrow heads have a small margin, and text keys outweigh visual ones sooner."""

_CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ ' : ' }}{%- endif -%}
{%- if message['content'] is string -%}{{ ' ' + message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif 'text' in part -%}{{ ' ' + part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' :' }}{%- endif -%}"""


def load_reference(path: str | Path | None = None) -> tuple[Any, Any]:
    """Load the reference VLM and its processor, in float32 on the CPU.

    Args:
        path: folder of another base made by `keepsight lab pretrain`. Default: the shipped one.

    Returns:
        `(model, processor)`; the model is in eval mode. A memory saved on the shipped model records its base as
        `keepsight/reference`, a name that means the same on every machine.
    """
    import torch

    from keepsight.checkpoints.bases import read_base
    from keepsight.checkpoints.load import load_processor

    folder = reference_path() if path is None else Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint folder: it has no config.json. Make one: keepsight lab pretrain -o {folder}"
        )
    model = read_base(folder, dtype=torch.float32)
    return model.eval(), load_processor(folder)


def build_model(seed: int = 0, head_dim: int = HEAD_DIM, words: Sequence[str] | None = None) -> Any:
    """An untrained reference VLM: 4 decoder layers of width 96, a vision tower of 2 layers of width 64.

    `words` is its vocabulary if it is not the narrations'; it begins with theirs.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from keepsight.lab.narration import BOS, EOS, IMAGE_PAD, PAD, TOKEN, VIDEO_PAD, VISION_END, VISION_START, VOCABULARY

    half = head_dim // 2  # rotary frequencies, shared out to time, height and width
    section = [half - 2 * (half // 3), half // 3, half // 3] if head_dim > 16 else [half // 2, half // 4, half // 4]
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(words or VOCABULARY),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": head_dim,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": section,
                "mrope_interleaved": True,
            },
            "pad_token_id": TOKEN[PAD],
            "bos_token_id": TOKEN[BOS],
            "eos_token_id": TOKEN[EOS],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 96,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=TOKEN[IMAGE_PAD],
        video_token_id=TOKEN[VIDEO_PAD],
        vision_start_token_id=TOKEN[VISION_START],
        vision_end_token_id=TOKEN[VISION_END],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3VLForConditionalGeneration(config)


def build_processor(words: Sequence[str] | None = None) -> Any:
    """The reference VLM's processor: a real `Qwen3VLProcessor` with patch 4, merge 2 and a word-level tokenizer.

    Any image is resized to about 1,024 pixels (32 x 32 when square), which is the size of a lab image.
    """
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    geometry: dict[str, Any] = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    geometry |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 1024, "longest_edge": 1024}}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**geometry),
        tokenizer=build_tokenizer(words),
        video_processor=Qwen3VLVideoProcessor(**geometry),
        chat_template=_CHAT_TEMPLATE,
    )


def build_tokenizer(words: Sequence[str] | None = None) -> Any:
    """A word-level tokenizer of some eighty words, or of `words`; what it does not know becomes `<unk>`."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from keepsight.lab.narration import BOS, EOS, PAD, SPECIAL, UNK, VOCABULARY

    table = {word: index for index, word in enumerate(words or VOCABULARY)}
    backend = Tokenizer(WordLevel(table, unk_token=UNK))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(SPECIAL[4:]),
        model_max_length=8192,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_reference(model: Any, folder: str | Path, processor: Any = None) -> None:
    """Write a checkpoint folder: weights rounded to float16 on disk (1.4 MB), loaded as float32 by default."""
    from transformers import GenerationConfig

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = model.config.text_config
    model.generation_config = GenerationConfig(
        max_new_tokens=64,
        do_sample=False,
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    model.save_pretrained(folder, state_dict={name: tensor.half() for name, tensor in model.state_dict().items()})
    readable(folder.rglob("*.safetensors"))
    (processor or build_processor()).save_pretrained(folder)
