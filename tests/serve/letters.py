"""The reference VLM with a tokenizer of single letters, which can write JSON, and a chat template that knows tools.

What it writes is noise; what it may write is the question.
"""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = '{}[]":,.-_0123456789abcdefghijklmnopqrstuvwxyzT<>/ \n+=ABCDEFGHIJKLMNOP'  # as many as the model's own words
TEMPLATE = """{{- bos_token -}}
{%- if tools -%}{{ 'tools ' }}{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}{%- endif -%}
{%- for message in messages -%}
{{ message['role'] + ':' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' -%}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{{ '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": '
   + (call['function']['arguments'] | tojson) + '}\\n</tool_call>' }}
{%- endfor -%}
{{ eos_token }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant:' }}{%- endif -%}"""


def with_letters(processor: Any, template: str = TEMPLATE) -> Any:
    """The reference's processor, with these letters in place of its words. Ids of special tokens stay."""
    words = processor.tokenizer
    special = [words.convert_ids_to_tokens(i) for i in range(8)]
    spell = {byte: pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(byte)[0][0] for byte in LETTERS}
    table = {token: i for i, token in enumerate([*special, *spell.values()])}
    inner = Tokenizer(models.BPE(vocab=table, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=special[0],
        unk_token=special[1],
        bos_token=special[2],
        eos_token=special[3],
        additional_special_tokens=special[4:],
        padding_side="left",
    )
    changed = copy.copy(processor)
    changed.tokenizer, changed.chat_template = tokenizer, template
    return changed
