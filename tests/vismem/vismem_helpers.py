"""What the tests of VisMem share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import BY_NAME as FIRST
from families import FIRST_WORD, LAST_WORD, MORE, Row, TinyFamily, make_inputs
from helpers import with_continuation
from peft import get_peft_model

from keepsight.backbone import FAMILIES as ROWS_OF_FAMILIES
from keepsight.vismem import MemoryPolicy, VisMemBranch, VisMemConfig, splice

BY_NAME = FIRST | {row.name: row for row in MORE}
#: Every tiny family that VisMem runs on.
EVERY = [tiny for tiny in BY_NAME.values() if ROWS_OF_FAMILIES[tiny.config().model_type].vision is not None]
# These share their vision encoder's code with another one, or compute in a way that others here do (mixtures, linear
# attention): they go through the essential tests only, the others through all.
ESSENTIAL = (
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "internvl_qwen2",
    "qwen3_omni_moe_thinker",
    "smolvlm",
    "glm4v_moe",
    "glm46v",
    "deepseek_vl",
    "llava_next_video",
    "lighton_ocr",
    "qianfan_ocr",
    "janus",
    "video_llama_3",
    "ernie4_5_vl_moe",
    "glmga",
    "shieldgemma2",
    "cosmos3_omni",
    "cosmos3_edge",
    "cohere_compass",
    "hyperclovax_vision_v2",
    "vipllava",
    "paddleocr_vl",
)
NAMES = tuple(tiny.name for tiny in EVERY if tiny.name not in ESSENTIAL)
SIZES = {
    "num_queries": 3,
    "num_short": 4,
    "num_long": 5,
    "query_width": 16,
    "query_heads": 2,
    "short_rank": 4,
    "long_rank": 4,
}
# Left padding, several images, text before and between images, a row without any image.
ROWS = [Row(3, (1, 2), 2, (2, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2), Row(7, seed=3)]
# Ragged: one row invokes once, one twice (either type), one never.
PLAN = [{3: "long"}, {1: "short", 6: "long"}, {}]
CLOSE = {"rtol": 0.0, "atol": 3e-5}


def attach(model: Any, adapter_name: str = "default", seed: int = 5, **config: Any) -> Any:
    """The model with a VisMem of random weights, strong enough that a wrong memory moves logits far."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, VisMemConfig(**(SIZES | config)), adapter_name=adapter_name)
    strengthen(peft_model, adapter_name)
    return peft_model.eval()


@torch.no_grad()
def strengthen(model: Any, adapter_name: str = "default") -> None:
    for name, parameter in VisMemBranch.of(model).vismem_memory[adapter_name].named_parameters():
        if name.endswith(".up") or "slots" in name:
            parameter.normal_(std=0.3)
        elif "gain" in name:
            parameter.fill_(8.0)
        elif "rows" in name:
            parameter.normal_(std=0.05)
        elif parameter.ndim == 2:
            parameter.mul_(3)


def built(name: str, rows: list[Row] | None = None, **config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """(model with a strong VisMem, inputs for `rows`)."""
    family: TinyFamily = BY_NAME[name]
    model = family.build()
    inputs = make_inputs(family, model, ROWS if rows is None else rows)
    return attach(model, **config), inputs


class WordsAndMemory:
    """A logits processor: random models write words and memories only, never placeholder or end tokens."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, :FIRST_WORD] = float("-inf")
        scores[:, LAST_WORD:128] = float("-inf")
        return scores


def generate(model: Any, inputs: dict[str, torch.Tensor], n: int = 24, **kwargs: Any) -> Any:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": n}
    options["logits_processor"] = [WordsAndMemory()]
    return model.generate(**inputs, **(options | kwargs))


def forced(plan: Any = None) -> MemoryPolicy:
    return MemoryPolicy("forced", at=PLAN if plan is None else plan)


@torch.no_grad()
def uncached(model: Any, inputs: dict[str, torch.Tensor], out: Any) -> torch.Tensor:
    """Logits [B, new, V] of one uncached forward of the whole sequences, latents spliced in."""
    prompt = inputs["input_ids"].shape[1]
    longer = with_continuation(inputs, out.sequences[:, prompt:])
    with splice(model, out.sequences, out.invocations):
        return model(**longer, use_cache=False).logits[:, prompt - 1 : -1]


def at_choices(out: Any, values: torch.Tensor) -> torch.Tensor:
    """Rows of values [B, new, ...] at the positions where the model chose."""
    return values[out.sampled]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[tiny.name for tiny in EVERY])
def any_name(request: pytest.FixtureRequest) -> str:
    return request.param
