"""A random language model of two layers, and a few drawings: everything that the eye needs, in a second."""

from functools import lru_cache

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from studies.eye.drawings.pictures import Pictures
from studies.eye.language import SPECIAL
from studies.eye.sizes import TINY

CONCEPTS = ["apple", "bell", "cat", "dog", "fish", "key"]
STYLES = ["round", "flat", "emojione-v1"]
SIZE = TINY


@lru_cache(maxsize=1)
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(one) for one in ("<|im_start|>", "<|im_end|>", *SPECIAL.values())])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")


def language():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(tokenizer())}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rope, max_position_embeddings=8192)).eval()


def drawings():
    draws = torch.Generator().manual_seed(0)
    of = [(name, style) for name in [*CONCEPTS, "other-thing"] for style in STYLES]
    pixels = torch.randint(256, (len(of), 64, 64, 4), generator=draws, dtype=torch.uint8)
    names, styles = [name for name, _ in of], [style for _, style in of]
    return Pictures(pixels, names, styles, [True] * len(of), CONCEPTS, ["emojione-v1"])


def texts():
    """Tokens of a text that the language is kept by."""
    return [tokenizer()("Once upon a time, long ago, there was a sea. " * 20)["input_ids"]]
