"""What both methods share as methods of PEFT."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, Row, make_inputs
from helpers import attach, logits
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

import keepsight
from keepsight.peft_method import memory_off

ROWS = [Row(2, (2, 2), 4, seed=1)]
CONFIGS = {
    "pvm": lambda: keepsight.PvmConfig(layers=[1, 3], width=32),
    "vismem": lambda: keepsight.VisMemConfig(num_queries=3, num_short=4, num_long=5, query_width=16, query_heads=2),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["injected", "wrapped"])
def test_a_memory_is_injected_by_its_own_state_dict(method: str, wrapped: bool) -> None:
    family = BY_NAME["qwen3_vl"]
    model: Any = family.build()
    if wrapped:
        model = get_peft_model(model, CONFIGS[method]())
    else:
        inject_adapter_in_model(CONFIGS[method](), model)
    names = set(get_peft_model_state_dict(model))
    again = inject_adapter_in_model(CONFIGS[method](), family.build(), state_dict=get_peft_model_state_dict(model))
    assert set(get_peft_model_state_dict(again)) == {name.removeprefix("base_model.model.") for name in names}


def test_a_state_dict_of_fewer_layers_is_refused() -> None:
    family = BY_NAME["qwen3_vl"]
    small = get_peft_model_state_dict(
        inject_adapter_in_model(keepsight.PvmConfig(layers=[1], width=32), family.build())
    )
    with pytest.raises(keepsight.BrokenAdapterError, match=r"expected is, for example, .*layers\.3\..*stored is"):
        inject_adapter_in_model(CONFIGS["pvm"](), family.build(), state_dict=small)


@pytest.mark.parametrize("method", CONFIGS)
def test_adapter_names_are_refused(method: str) -> None:
    family = BY_NAME["qwen3_vl"]
    model: PeftModel = get_peft_model(family.build(), CONFIGS[method]())
    inputs = make_inputs(family, model, ROWS)
    for call in (model, model.generate, model.get_base_model()):
        with pytest.raises(keepsight.KeepsightError, match=r"adapter_names=.*set_adapter\('default'\)"):
            call(**inputs, adapter_names=["default"])


@pytest.mark.parametrize("method", CONFIGS)
def test_what_was_taken_off_is_off_and_cannot_be_saved(method: str, tmp_path: Path) -> None:
    """Twice is as once; and a file that was saved before is not written over by an empty one."""
    model: PeftModel = get_peft_model(BY_NAME["qwen3_vl"].build(), CONFIGS[method]())
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    base = model.unload()
    assert model.unload() is base
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    with pytest.raises(keepsight.KeepsightError, match="nothing to save"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
    assert get_peft_model(base, CONFIGS[method]()).unload() is base


def test_memory_off_is_of_one_model_and_one_thread() -> None:
    family = BY_NAME["internvl_qwen2"]
    inputs = make_inputs(family, family.build(), ROWS)
    base, model, other = logits(family.build(), inputs), attach(family.build()), attach(family.build())
    on = logits(model, inputs)
    elsewhere: list[torch.Tensor] = []
    with memory_off(model):
        assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(other, inputs), on)
        thread = threading.Thread(target=lambda: elsewhere.append(logits(model, inputs)))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), memory_off(other):
            1 / 0  # noqa: B018
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(elsewhere[0], on)
    assert torch.equal(logits(model, inputs), on)
    assert not torch.equal(on, base)
