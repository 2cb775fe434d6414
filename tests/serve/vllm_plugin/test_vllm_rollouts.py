"""GRPO's completions by vLLM: what it could not write is refused before any long work (tests_vllm/ runs it)."""

from __future__ import annotations

from typing import Any

import pytest

from keepsight.errors import KeepsightError
from keepsight.pvm import PvmConfig
from keepsight.serve.vllm.check import why_not
from keepsight.serve.vllm.rollouts import VllmRollouts, _collapsed
from keepsight.train.run.engines import Engine
from keepsight.train.run.learner import Learner
from keepsight.train.run.settings import GrpoSettings


def check(model_type: str = "qwen3_vl", causal: bool = True, engine: Engine | None = None, **changes: Any) -> None:
    mode = changes.pop("mode", "colocate")
    pvm = PvmConfig(causal=causal)
    pvm.base_model_type = model_type
    settings = GrpoSettings(device="cpu", **changes)
    VllmRollouts(use_vllm=True, vllm_mode=mode).check("base", pvm, Learner(memory=pvm), settings, engine or Engine())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"causal": False}, "published rule"),
        ({"model_type": "gemma3"}, "does not serve model_type 'gemma3'"),
        ({"load_in_4bit": True}, "other weights than those that learn"),
        ({"engine": Engine("fsdp2", 2, 0)}, "handing whole ones to vLLM is not built"),
        ({"engine": Engine("zero3", 2, 0)}, "handing whole ones to vLLM is not built"),
        ({"mode": "server"}, "NCCL"),
    ],
)
def test_refused_by_name(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(KeepsightError, match=said):
        check(**wrong)


@pytest.mark.skipif(why_not() is None, reason="a vLLM that carries memories is installed")
def test_without_vllm_the_error_says_how_to_install_it() -> None:
    with pytest.raises(KeepsightError, match=r"vLLM is not installed\. Install it: .*vllm"):
        check()


def test_images_are_one_token_each() -> None:
    assert _collapsed([1, 8, 9, 9, 9, 7, 2, 2, 8, 9, 7], 9, framed=False) == [1, 8, 9, 7, 2, 2, 8, 9, 7]
    assert _collapsed([1, 8, 9, 9, 9, 7, 2, 2, 8, 9, 7], 9, framed=True) == [1, 9, 2, 2, 9]
    assert _collapsed([8, 9, 7, 8, 9, 9, 7, 7], 9, framed=True) == [9, 9, 7]
    assert _collapsed([1, 2, 2, 3], 9, framed=True) == [1, 2, 2, 3]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_a_share_of_the_memory_is_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match="vllm_gpu_memory"):
        VllmRollouts(vllm_gpu_memory=share)
