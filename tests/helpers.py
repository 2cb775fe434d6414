"""What the tests of PVM share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import FIRST_WORD, IMAGE, LAST_WORD, Row, TinyFamily, make_inputs
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import ContinuousBatchingConfig, GenerationConfig

import keepsight

LAYERS = [1, 3]
# Left padding, several images, text before and between images, a row without any image.
MIXED_ROWS = [
    Row(3, (1, 2), 2, (2, 2), 4, seed=1),
    Row(1, (2, 2), 5, seed=2),
    Row(7, seed=3),
]
CLOSE = {"rtol": 0.0, "atol": 2e-5}


def attach(model: Any, gate: float = 0.7, adapter_name: str = "default", seed: int = 5, **config: Any) -> Any:
    """The model with a PVM of random weights, its gates opened so that it matters."""
    torch.manual_seed(seed)
    options = {"layers": LAYERS, "width": 32} | config
    peft_model = get_peft_model(model, keepsight.PvmConfig(**options), adapter_name=adapter_name)
    strengthen(peft_model, gate, adapter_name)
    return peft_model.eval()


def strengthen(model: Any, gate: float, adapter_name: str = "default") -> None:
    """Open the gates and widen the random weights, so that a wrong memory moves logits far beyond rounding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"pvm_blocks.{adapter_name}." in name:
                if name.endswith(".gate"):
                    parameter.fill_(gate)
                elif parameter.ndim == 2:
                    parameter.mul_(2)


def built(family: TinyFamily, rows: list[Row] | None = None, **config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(model with an open PVM, inputs for `rows`)."""
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS if rows is None else rows)
    return attach(model, **config), inputs


def in_bfloat16(given: Any) -> Any:
    """A model's weights, or the floating point of its inputs, rounded to bfloat16.

    Buffers stay, as they do where transformers loads in that dtype: rotary frequencies among them.
    """
    if isinstance(given, dict):
        return {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    for parameter in given.parameters():
        parameter.data = parameter.data.bfloat16()
    return given


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """[B, T, V]."""
    return model(**inputs, **kwargs).logits


def with_continuation(inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with text `tokens` [B, n] appended: what one uncached forward sees of a finished generation."""
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    ones = torch.ones_like(tokens)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones.to(inputs["attention_mask"].dtype)], 1)
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        marks_images = torch.equal(types.bool(), inputs["input_ids"] == IMAGE)  # Gemma 3; else PaliGemma's prefix
        follows = torch.full_like(tokens, int(not marks_images), dtype=types.dtype)
        longer["token_type_ids"] = torch.cat([types, follows], 1)
    if "mm_token_type_ids" in inputs:
        zeros = torch.zeros_like(tokens, dtype=inputs["mm_token_type_ids"].dtype)
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], 1)
    return longer


class OnlyWords:
    """A logits processor: words only, so that random models never write placeholder or end tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, :FIRST_WORD] = scores[:, LAST_WORD:] = float("-inf")
        return scores


def generate(model: Any, inputs: dict[str, torch.Tensor], n: int = 6, **kwargs: Any) -> Any:
    """`n` tokens, words only, greedy unless told otherwise; returns the output object with raw logits."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": n} | kwargs
    return model.generate(**inputs, logits_processor=[OnlyWords()], **options)


def batched_continuously(model: Any, ids: torch.Tensor) -> tuple[list[int], str | None]:
    """(three tokens that continuous batching writes behind ids [T], what it says went wrong)."""
    wanted = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=1)
    sizes = ContinuousBatchingConfig(num_blocks=4, block_size=32, max_batch_tokens=32)
    out = model.generate_batch([ids.tolist()], generation_config=wanted, continuous_batching_config=sizes)
    (only,) = out.values()
    return only.generated_tokens, only.error


def cached_and_uncached(model: Any, inputs: dict[str, torch.Tensor], out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, n, V] of the steps of a greedy generation, and the same from one uncached forward."""
    prompt = inputs["input_ids"].shape[1]
    tokens = out.sequences[:, prompt:]
    whole = logits(model, with_continuation(inputs, tokens), use_cache=False)
    return torch.stack(out.logits, 1), whole[:, prompt - 1 : -1]


@contextmanager
def counted(module_class: Any, name: str) -> Iterator[list[int]]:
    """Counts the calls of a method: `calls[0]` inside the block."""
    original, calls = getattr(module_class, name), [0]

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    setattr(module_class, name, spy)
    try:
        yield calls
    finally:
        setattr(module_class, name, original)


def torch_counts_attention() -> bool:
    """Whether this torch's counter of operations sees attention on a CPU."""
    heads = torch.zeros(1, 1, 8, 8)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    return counter.get_total_flops() > 0
