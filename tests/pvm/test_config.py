"""What PvmConfig accepts, what it resolves to, and the lessons it gives."""

from types import SimpleNamespace

import pytest
import torch
from families import BY_NAME, Row, make_inputs
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import keepsight
from keepsight.backbone import Backbone
from keepsight.pvm.config import default_layers
from keepsight.pvm.kernels import attention_for
from keepsight.pvm.module import sdpa


@pytest.mark.parametrize(
    ("settings", "lesson"),
    [
        ({"layer": [1]}, r"no setting 'layer'. Did you mean 'layers'"),
        ({"layers": []}, "gives no layer a memory"),
        ({"layers": [1, 1]}, "names a layer twice"),
        ({"layers": ["8"]}, r"layers=\['8'\]: expected a list of whole numbers or None"),
        ({"causal": "false"}, "causal='false': expected true or false"),
        ({"width": True}, "width=True: expected a whole number"),
        ({"init_gate": float("nan")}, "init_gate=nan: expected a finite number"),
        ({"eps": "1e-6"}, "eps='1e-6': expected a finite number or None"),
        ({"base_hidden_size": "96"}, "base_hidden_size='96': expected a whole number or None"),
        ({"width": 0}, "width=0: expected a positive whole number"),
        ({"num_kv_heads": 1.5}, "num_kv_heads=1.5"),
        ({"branch": "lora"}, "expected 'memory' or 'mlp'"),
        ({"target_modules": ["mlp"]}, "no setting 'target_modules'"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, lesson):
    with pytest.raises(ValueError, match=lesson):
        keepsight.PvmConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "lesson"),
    [
        ({"layers": [2, 4]}, r"\[4\] out of range; the model has layers 0 to 3"),
        ({"layers": [-1]}, "out of range"),
        ({"width": 40}, r"not a multiple of head_dim=16. Try 32 or 48"),
        ({"width": 48, "num_kv_heads": 2}, "does not divide the 3 heads"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_anything_changes(settings, lesson):
    model = BY_NAME["qwen3_vl"].build()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=lesson):
        get_peft_model(model, keepsight.PvmConfig(**settings))
    assert list(model.state_dict()) == names


def test_unsupported_models_are_told_what_is_supported():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(keepsight.UnsupportedModelError) as error:
        get_peft_model(LlamaForCausalLM(config), keepsight.PvmConfig())
    message = str(error.value)
    assert "LlamaForCausalLM" in message
    assert "Qwen3-VL, " in message
    assert "docs/families.md has them all" in message


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0]), (2, [1]), (4, [1, 2, 3]), (28, [6, 12, 18]), (36, [8, 16, 24]), (64, [14, 28, 42])]
)
def test_default_layers_keep_the_papers_stride(depth, layers):
    assert default_layers("internvl", depth, 1024) == layers


def test_widths_that_fit_small_models():
    for width, head_dim in ((64, 16), (48, 16)):
        model = BY_NAME["qwen3_vl"].build()
        pvm = get_peft_model(model, keepsight.PvmConfig(width=width)).peft_config["default"]
        assert pvm.head_dim == head_dim
        assert (pvm.width // head_dim) % pvm.num_kv_heads == 0


def test_families_merge_units():
    sides = {name: Backbone.of(family.build()).merge_side for name, family in BY_NAME.items()}
    assert sides == {
        "qwen3_vl": 2,
        "qwen3_vl_moe": 2,
        "qwen2_5_vl": 2,
        "qwen3_5": 2,
        "qwen3_5_moe": 2,
        "internvl_qwen2": 2,
        "internvl_qwen3": 2,
        "llava_onevision": 1,
    }


def test_every_family_has_its_parts(family):
    model = family.build()
    backbone = Backbone.of(model)
    assert backbone.vision_tower is not backbone.projector
    assert sum(p.numel() for p in backbone.projector.parameters()) > 0
    ids = make_inputs(family, model, [Row(2, (2, 2), 3)])["input_ids"]
    table = model.get_input_embeddings()
    assert torch.equal(backbone.visual_mask(ids), backbone.visual_mask(inputs_embeds=table(ids)))


def test_flash_attention_is_used_where_the_model_uses_it(monkeypatch):
    """In half precision, with nothing to mask, the block calls the model's own flash attention; else SDPA."""
    calls = []

    def flash(module, query, key, value, attention_mask, scaling, is_causal=None, **kwargs):
        calls.append((module.config._attn_implementation, is_causal))
        return sdpa(query, key, value, None).transpose(1, 2), None

    name = "flash_attention_of_this_test"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash)
    config = SimpleNamespace(_attn_implementation=name)
    q, k, v = (torch.randn(1, heads, 5, 16).bfloat16() for heads in (4, 2, 2))
    assert torch.equal(attention_for(config, None)(q, k, v, None), sdpa(q, k, v, None))
    assert calls == [(name, False)]
    attention_for(config, None)(q.float(), k.float(), v.float(), None)  # flash kernels know half precision only
    assert len(calls) == 1
    assert attention_for(config, torch.ones(1, 1, 1, 5, dtype=torch.bool)) is sdpa
    assert attention_for(SimpleNamespace(_attn_implementation="eager"), None) is sdpa
