"""PEFT's verbs, transformers' own adapter loading, and a LoRA beside the memory."""

import copy
import json
from importlib import metadata

import pytest
import torch
from families import BY_NAME, Row, make_inputs
from helpers import MIXED_ROWS, attach, built, logits, strengthen
from packaging.version import Version
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.peft import MIN_PEFT_VERSION

import keepsight
from keepsight.checkpoints.adapters import inspect_adapter

LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False)


def lora():
    torch.manual_seed(7)
    return copy.deepcopy(LORA)


def test_save_then_load_equals_before(family, tmp_path):
    model, inputs = built(family)
    before = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(logits(loaded, inputs), before)
    sparing = PeftModel.from_pretrained(family.build(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(sparing, inputs), before)


#: transformers renames parts of every name that it loads into these.
RENAMED = ("kimi_k25", "cosmos3_edge", "deepseek_ocr2", "unlimited_ocr")


def test_transformers_load_adapter_equals_peft(family, tmp_path):
    model, inputs = built(family)
    before = logits(model, inputs)
    model.save_pretrained(tmp_path)
    plain = family.build()
    if family.name in RENAMED:
        with pytest.raises(keepsight.KeepsightError, match="not there under their names"):
            plain.load_adapter(str(tmp_path))
        return
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain, inputs), before)
    if Version(metadata.version("peft")) >= Version(MIN_PEFT_VERSION):
        plain.disable_adapters()
        assert torch.equal(logits(plain, inputs), logits(family.build().requires_grad_(False), inputs))


def test_the_saved_adapter_holds_the_memory_and_nothing_else(tmp_path):
    model, _ = built(BY_NAME["qwen3_vl"], layers=None, width=None)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    assert sum(torch.Size(shape).numel() for shape in shapes) == trainable
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["layers"] == [1, 2, 3]  # what PvmConfig() resolved to
    assert saved["width"] == 64
    assert "target_modules" not in saved


def test_adapters_add_set_delete(tmp_path):
    family = BY_NAME["internvl_qwen3"]
    model, inputs = built(family)
    base = logits(family.build(), inputs)
    first = logits(model, inputs)
    model.add_adapter("second", keepsight.PvmConfig(layers=[0, 1], width=16))
    assert torch.equal(logits(model, inputs), first)  # added, not active
    strengthen(model, -0.5, "second")
    model.set_adapter("second")
    second = logits(model, inputs)
    assert not torch.allclose(second, first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, inputs)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), first)
    model.load_adapter(tmp_path / "second", "again")
    model.set_adapter("again")
    assert torch.equal(logits(model, inputs), second)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)


def test_merge_is_refused(family):
    model, _ = built(family)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(keepsight.MergeError, match="cannot be merged"):
            merge()


@pytest.mark.parametrize("first", ["lora", "memory"])
def test_lora_and_memory_on_one_model_save_separately(first, tmp_path):
    family = BY_NAME["qwen3_vl"]
    inputs = make_inputs(family, family.build(), MIXED_ROWS)
    model = family.build()
    if first == "lora":
        with_lora = get_peft_model(model, lora())
        with_memory = attach(model, adapter_name="memory")
    else:
        with_memory = attach(model, adapter_name="memory")
        with_lora = get_peft_model(model, lora())
    both = logits(model, inputs)
    with_memory.save_pretrained(tmp_path / "memory", selected_adapters=["memory"])
    with_lora.save_pretrained(tmp_path / "lora", selected_adapters=["default"])

    alone = family.build()
    alone = PeftModel.from_pretrained(alone, tmp_path / "lora")
    names = list(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert not any("pvm" in name or "visual_memory" in name for name in names)
    only_memory = PeftModel.from_pretrained(family.build(), tmp_path / "memory" / "memory")
    with with_memory.disable_adapter():  # switches the memory only
        torch.testing.assert_close(logits(model, inputs), logits(alone, inputs), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(only_memory, inputs), both)

    again = family.build()
    PeftModel.from_pretrained(again, tmp_path / "lora")
    PeftModel.from_pretrained(again, tmp_path / "memory" / "memory", adapter_name="memory")
    assert torch.equal(logits(again, inputs), both)


def test_a_name_taken_by_another_method_is_refused():
    model = BY_NAME["qwen3_vl"].build()
    with_lora = get_peft_model(model, lora())
    with pytest.raises(keepsight.KeepsightError, match="adapter_name='memory'"):
        get_peft_model(model, keepsight.PvmConfig())
    assert isinstance(with_lora.peft_config["default"], LoraConfig)  # untouched


def test_another_base_is_refused(tmp_path):
    model, _ = built(BY_NAME["qwen3_vl"])
    model.save_pretrained(tmp_path)
    with pytest.raises(keepsight.AdapterMismatchError, match="model_type qwen3_vl, here qwen2_5_vl"):
        PeftModel.from_pretrained(BY_NAME["qwen2_5_vl"].build(), tmp_path)


def test_unknown_keys_on_disk_are_refused(tmp_path):
    model, _ = built(BY_NAME["qwen3_vl"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"widht": 64}))
    with pytest.raises(ValueError, match=r"no setting 'widht'. Did you mean 'width'"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_replaced_memory_is_what_the_branch_reads():
    """`replace_memory` with another sample's image gives that sample's retrieval; the own image gives no change."""
    family = BY_NAME["internvl_qwen2"]
    model, _ = built(family)
    own, other = (make_inputs(family, model, [Row((2, 2), 5, seed=s)]) for s in (1, 2))
    seen = {}

    def keep(embeds, valid):
        seen["embeds"] = embeds
        return embeds

    with keepsight.pvm.replace_memory(keep):
        unchanged = logits(model, own)
    assert torch.equal(unchanged, logits(model, own))
    with keepsight.pvm.replace_memory(keep):
        logits(model, other)
    with keepsight.pvm.replace_memory(lambda embeds, valid: seen["embeds"]):
        swapped = logits(model, own)
    assert not torch.allclose(swapped, unchanged)
    mixed = dict(own)
    with keepsight.pvm.replace_memory(lambda embeds, valid: embeds * 0 + seen["embeds"]):
        assert torch.equal(logits(model, mixed), swapped)
    assert torch.equal(logits(model, own), unchanged)  # nothing stays behind
    wrong_shape = keepsight.pvm.replace_memory(lambda embeds, valid: embeds[:, :1])
    with pytest.raises(ValueError, match="must return visual embeddings of the shape"), wrong_shape:
        logits(model, own)


def test_non_finite_and_truncated_adapters_are_named(tmp_path):
    model, _ = built(BY_NAME["qwen3_vl"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    info = inspect_adapter(tmp_path)
    assert info.num_parameters == sum(t.numel() for t in tensors.values())
    assert info.gates == {1: pytest.approx(0.7), 3: pytest.approx(0.7)}
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    with pytest.raises(keepsight.BrokenAdapterError, match=r"values of .*q_proj.weight are NaN"):
        inspect_adapter(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    with pytest.raises(keepsight.BrokenAdapterError, match=r"lacks 1 of .*cross_attn.q_proj.weight"):
        inspect_adapter(tmp_path)
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(keepsight.BrokenAdapterError, match="cut off"):
        inspect_adapter(tmp_path)
