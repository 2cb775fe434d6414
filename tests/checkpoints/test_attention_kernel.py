"""A kernel that cannot run is refused by name before any weight is read; one that can changes no token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import BY_NAME

import keepsight
from keepsight.backbone import Backbone
from keepsight.checkpoints import attention
from keepsight.checkpoints.attention import check_attention, kernel_named
from keepsight.errors import KeepsightError
from keepsight.train.run.preflight import check_kernel
from keepsight.train.run.settings import SftSettings


@pytest.fixture
def bfloat(tmp_path: Path) -> Path:
    """A folder with nothing but the configuration of a base in bfloat16."""
    config = BY_NAME["qwen3_vl"].build().config
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_flash_attention_is_refused_where_it_cannot_run(bfloat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attention_2", "flash_attention_3"):
        with pytest.raises(KeepsightError, match=rf"{name} runs on GPUs only.*--attention sdpa"):
            check_attention(bfloat, name, "cpu")
        with pytest.raises(KeepsightError, match=rf"{name} is not installed: .*--attention sdpa"):
            check_attention(bfloat, name, "cuda")
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    with pytest.raises(KeepsightError, match="computes in 16 bits, and the base is float32"):
        check_attention(bfloat, "flash_attention_2", "cuda", dtype="float32")


def test_what_a_family_has_not_is_refused(bfloat: Path) -> None:
    with pytest.raises(KeepsightError, match=r"cannot run with flex_attention.*Use --attention sdpa"):
        check_attention(bfloat, "flex_attention")
    for name in (None, "sdpa", "eager"):
        check_attention(bfloat, name)


def test_flex_attention_runs_on_a_cpu_and_does_not_train_there(tmp_path: Path) -> None:
    BY_NAME["internvl_qwen2"].build().config.save_pretrained(tmp_path)
    assert SftSettings(attention="flex").attention == "flex_attention"  # as the command line may call it
    check_attention(tmp_path, "flex_attention", "cpu")
    with pytest.raises(KeepsightError, match=r"flex_attention has no backward pass on a CPU.*--attention sdpa"):
        check_kernel(SftSettings(attention="flex", device="cpu"), tmp_path)


def test_loading_refuses_before_weights_are_read(bfloat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BY_NAME["qwen3_vl"].build().save_pretrained(bfloat)
    monkeypatch.setattr("keepsight.checkpoints.load.AutoProcessor", lambda: pytest.fail("something was read"))
    with pytest.raises(KeepsightError, match="flash_attention_2 runs on GPUs only"):
        keepsight.load(bfloat, device="cpu", attn_implementation="flash_attention_2")


def test_the_names_are_those_of_transformers() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = set(attention.get_args(attention.Attention))
    assert {kernel_named(name) for name in names} - {"eager"} <= set(ALL_ATTENTION_FUNCTIONS.valid_keys())


def test_a_chosen_kernel_is_the_one_that_runs() -> None:
    seen = {}
    for name in (None, "sdpa", "eager"):
        model, _ = keepsight.load("keepsight/reference", device="cpu", attn_implementation=name)
        assert Backbone.of(model).decoder.config._attn_implementation == (name or "sdpa")
        with torch.no_grad():
            seen[name] = model(input_ids=torch.tensor([[7, 5, 9, 8]])).logits
    torch.testing.assert_close(seen["eager"], seen["sdpa"], rtol=0, atol=1e-4)
    assert torch.equal(seen[None], seen["sdpa"])
