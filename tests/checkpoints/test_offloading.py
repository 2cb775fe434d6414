"""A base of which parts wait on disk, from where accelerate brings them: its memory is where the layers compute."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import attach, logits
from peft import PeftModel, get_peft_model

import keepsight
from keepsight.checkpoints.bases import read_base
from keepsight.lab.reference import build_model, build_processor, save_reference


def _vismem(model: Any) -> Any:
    config = keepsight.VisMemConfig(num_queries=2, num_short=2, num_long=2, query_width=16, query_heads=2)
    model = get_peft_model(model, config)
    keepsight.add_memory_tokens(build_processor(), model)
    return model


METHODS: dict[str, Any] = {"pvm": lambda model: attach(model, layers=None, init_gate=0.5), "vismem": _vismem}


def _places(model: Any, embedding: str) -> dict[str, str]:
    """Every second layer on disk; the vision encoder and the embedding where it computes, or as told."""
    text = "model.language_model"
    places = {"model.visual": "cpu", f"{text}.norm": "cpu", f"{text}.rotary_emb": "cpu"}
    places |= {f"{text}.embed_tokens": embedding, "lm_head": embedding}
    return places | {
        f"{text}.layers.{index}": "disk" if index % 2 else "cpu"
        for index in range(len(model.model.language_model.layers))
    }


@pytest.mark.parametrize("embedding", ["cpu", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_a_memory_on_an_offloaded_base(method: str, embedding: str, tmp_path: Path) -> None:
    plain = build_model(seed=1)
    save_reference(plain, tmp_path / "base")
    METHODS[method](read_base(tmp_path / "base", dtype=torch.float32)).save_pretrained(tmp_path / "memory")
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "device_map": _places(plain, embedding),
        "offload_folder": tmp_path / "offloaded",
    }
    with pytest.raises(keepsight.KeepsightError, match=r"PEFT divides such a model anew .*keepsight\.load"):
        PeftModel.from_pretrained(read_base(tmp_path / "base", **options), tmp_path / "memory")
    if (method, embedding) == ("vismem", "disk"):
        with pytest.raises(keepsight.KeepsightError, match="Keep embed_tokens and lm_head where the model computes"):
            keepsight.load(tmp_path / "memory", **options)
        return
    model, processor = keepsight.load(tmp_path / "memory", **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert not any(p.is_meta for name, p in model.named_parameters() if "pvm_" in name or "vismem_" in name)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=keepsight.example_image(), text=text, return_tensors="pt")
    whole, _ = keepsight.load(tmp_path / "memory", dtype=torch.float32)
    assert torch.equal(logits(model, inputs), logits(whole, inputs))
    with keepsight.pvm.memory_off(whole):
        apart = (logits(model, inputs)[..., :8] - logits(whole, inputs)[..., :8]).abs().max()
    assert method == "vismem" or apart > 1e-4
    answers = [m.generate(**inputs, max_new_tokens=4, do_sample=False) for m in (model, whole)]
    assert torch.equal(answers[0], answers[1])
    assert math.isfinite(float(apart))
