"""Tiny random VLMs with processors of their own, and open memories on them: whole checkpoint folders, as users have.

Heads are 32 wide, the least that vLLM's CPU attention knows. Everything is float32 and drawn from seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

import keepsight
from keepsight.vismem import VisMemBranch, VisMemConfig, add_memory_tokens

SPECIAL = ["<pad>", "<eos>", "<unk>", "<s>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = [f"w{i}" for i in range(112)]
TOKEN = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
VOCAB, FIRST_WORD = len(TOKEN), len(SPECIAL)
IMAGE, VIDEO = TOKEN["<|image_pad|>"], TOKEN["<|video_pad|>"]
LAYERS = [1, 3]

CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['content'] is string -%}{{ ' ' + message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ ' PLACEHOLDER' }}{%- elif 'text' in part -%}{{ ' ' + part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}"""
_QWEN_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


def tokenizer(**special: str) -> Any:
    backend = Tokenizer(WordLevel(dict(TOKEN), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<s>",
        extra_special_tokens=special or SPECIAL[4:],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def _text(**more: Any) -> dict[str, Any]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": TOKEN["<pad>"],
        "eos_token_id": TOKEN["<eos>"],
        "bos_token_id": TOKEN["<s>"],
    }
    return sizes | more


_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": TOKEN["<|vision_start|>"],
    "vision_end_token_id": TOKEN["<|vision_end|>"],
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
}
_GEOMETRY: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"shortest_edge": 64, "longest_edge": 16384},
}


def _qwen3_vl() -> tuple[Any, Any]:
    config = transformers.Qwen3VLConfig(
        text_config=_text(head_dim=32, rope_parameters=_MROPE | {"mrope_interleaved": True}, attention_bias=False),
        vision_config=_VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        **_TOKENS,
    )
    processor = transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_GEOMETRY),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen3VLVideoProcessor(**_GEOMETRY),
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDER", _QWEN_PLACEHOLDER),
    )
    return config, processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    config = transformers.Qwen2_5_VLConfig(
        text_config=_text(rope_parameters=_MROPE),
        vision_config=_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
        **_TOKENS,
    )
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_GEOMETRY),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(**_GEOMETRY),
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDER", _QWEN_PLACEHOLDER),
    )
    return config, processor


def _qwen3_5() -> tuple[Any, Any]:
    config = transformers.Qwen3_5Config(
        text_config=_text(
            head_dim=32,
            rope_parameters=_MROPE
            | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25, "mrope_interleaved": True},
            layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
            linear_key_head_dim=128,  # the CPU kernel knows no other
            linear_value_head_dim=128,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
        ),
        vision_config=_VISION | {"num_position_embeddings": 64},
        **_TOKENS,
    )
    processor = _qwen3_vl()[1]
    processor.tokenizer = _qwen3_5_tokenizer()
    return config, processor


def _qwen3_5_tokenizer() -> Any:
    """Transformers gives every Qwen3.5 checkpoint its own byte-level class, whatever the checkpoint says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (not letter.isascii(), letter))
    # "\u0120" is how byte-level tokenizers write a space
    letters = ["\u0120", *(letter for letter in alphabet if letter != "\u0120")][: VOCAB - FIRST_WORD]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    return transformers.Qwen3_5Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<s>",
        extra_special_tokens=SPECIAL[4:],
        model_max_length=4096,
    )


def _internvl() -> tuple[Any, Any]:
    config = transformers.InternVLConfig(
        text_config=_text(model_type="qwen2"),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer(
            start_image_token="<|vision_start|>",
            end_image_token="<|vision_end|>",
            context_image_token="<|image_pad|>",
            video_token="<|video_pad|>",
        ),
        video_processor=transformers.InternVLVideoProcessor(size={"height": 16, "width": 16}),
        image_seq_length=4,
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDER", "<|image_pad|>"),
    )
    return config, processor


def _llava_onevision() -> tuple[Any, Any]:
    config = transformers.LlavaOnevisionConfig(
        text_config=_text(model_type="qwen2"),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "vision_use_head": False,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]]
        ),
        tokenizer=tokenizer(),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size={"height": 16, "width": 16}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDER", "<|image_pad|>"),
    )
    return config, processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_5": _qwen3_5,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
}
#: What stands for one image in a prompt.
PLACEHOLDER = dict.fromkeys(FAMILIES, _QWEN_PLACEHOLDER) | dict.fromkeys(
    ["internvl", "llava_onevision"], "<|image_pad|>"
)


def make_base(family: str, folder: Path, spare: int = 0) -> Path:
    """A random model of `family` with its processor, and `spare` rows in its embedding that no token has."""
    config, processor = FAMILIES[family]()
    config.text_config.vocab_size += spare
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed_tokens" not in name:
                parameter.mul_(3)  # at the usual scale, random models of this size hardly look at their input
    model.generation_config = transformers.GenerationConfig(pad_token_id=TOKEN["<pad>"], do_sample=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_memory(base: Path, folder: Path, gate: float = 0.7, seed: int = 5, **config: Any) -> Path:
    """A PVM of random weights on `base`, its gates opened so that it matters."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    torch.manual_seed(seed)
    options: dict[str, Any] = {"layers": LAYERS, "width": 64} | config
    peft_model = get_peft_model(model, keepsight.PvmConfig(**options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "pvm_blocks." in name:
                if name.endswith(".gate"):
                    parameter.fill_(gate)
                elif parameter.ndim == 2:
                    parameter.mul_(2)
    peft_model.save_pretrained(folder)
    return folder


def make_vismem(base: Path, folder: Path, bias: float = 0.0, seed: int = 5, **config: Any) -> Path:
    """A VisMem of random weights on `base`, strong enough that a wrong memory changes answers.

    Args:
        base: the base's folder.
        folder: to make.
        bias: of the invocation tokens, so that the model writes them now and then.
        seed: of the weights.
        config: further settings.
    """
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    processor = transformers.AutoProcessor.from_pretrained(base)
    torch.manual_seed(seed)
    sizes = {"num_queries": 3, "num_short": 4, "num_long": 5, "query_width": 32, "query_heads": 2, "max_invocations": 3}
    options: dict[str, Any] = sizes | {"delimiters": ["w7", "w14"]} | config
    peft_model = get_peft_model(model, VisMemConfig(**options))
    with torch.no_grad():
        memory = VisMemBranch.of(peft_model).active
        for name, parameter in memory.named_parameters():
            if name.endswith(".up") or "slots" in name:
                parameter.normal_(std=0.3)
            elif "gain" in name:
                parameter.fill_(8.0)
            elif "rows" in name:
                parameter.normal_(std=0.05)
            elif parameter.ndim == 2:
                parameter.mul_(3)
        memory.rows.invoke_bias.fill_(bias)
    add_memory_tokens(processor, peft_model)
    peft_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_lora(base: Path, folder: Path) -> Path:
    """A LoRA of random weights on `base`, strong enough to change answers; another for each length of name."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(base)
    torch.manual_seed(len(folder.name))
    names = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    peft_model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=names))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft_model.save_pretrained(folder)
    return folder
