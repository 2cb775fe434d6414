"""Processors of the families whose own are not the reference model's."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import transformers
from families import TinyFamily

from keepsight.lab.narration import VOCABULARY
from keepsight.lab.reference import build_processor, build_tokenizer

TEMPLATE = (
    "{{- bos_token -}}{%- for m in messages -%}{%- if m['role']=='assistant' -%}{{' : '}}{%- endif -%}"
    "{%- for p in m['content'] -%}{%- if p['type']=='image' -%}{{'IMAGE'}}{%- else -%}{{' '+p['text']}}{%- endif -%}"
    "{%- endfor -%}{%- if m['role']=='assistant' -%}{{eos_token}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{' :'}}{%- endif -%}"
)


def tokenizer_with(*tokens: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return tokenizer


def internvl() -> Any:
    plain = tokenizer_with("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer,
        **{f"{name}_token": getattr(plain, f"{name}_token") for name in ("pad", "unk", "bos", "eos")},
        model_specific_special_tokens={f"{name}_token": token for name, token in names.items()},
    )
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"),
    )


def llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size={"height": 12, "width": 12}, image_grid_pinpoints=[[12, 12], [12, 24]]
        ),
        tokenizer=tokenizer_with("<image>", "<video>"),
        video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


#: The tokenizer class of some families, which transformers chooses by the model's type, spells words by their letters.
WORDS_AND_LETTERS = [*VOCABULARY, *(letter for letter in ("Ġ", *string.ascii_lowercase) if letter not in VOCABULARY)]


def family_folder(family: TinyFamily, folder: Path) -> Path:
    """A tiny model of a family with a processor of that family, saved as any VLM is."""
    makers = {"internvl_qwen2": internvl, "internvl_qwen3": internvl, "llava_onevision": llava_onevision}
    processor = makers[family.name]() if family.name in makers else build_processor(WORDS_AND_LETTERS)
    tokens = {name: getattr(processor, name, None) for name in ("image_token_id", "image_ids", "video_token_id")}
    if family.marks:
        for name in ("vision_start", "vision_end"):
            tokens[f"{name}_token_id"] = processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    model = family.build(**{name: token for name, token in tokens.items() if isinstance(token, int)})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
