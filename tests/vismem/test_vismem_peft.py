"""PEFT's verbs, PVM and LoRA on the same model, saved and loaded separately or together."""

import copy
import pickle
import re

import pytest
import torch
from families import make_inputs
from helpers import attach as attach_pvm
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from vismem_helpers import (
    BY_NAME,
    CLOSE,
    ROWS,
    SIZES,
    at_choices,
    attach,
    built,
    forced,
    generate,
    strengthen,
    uncached,
)

import keepsight
from keepsight.backbone import Backbone
from keepsight.lab.reference import build_model, save_reference
from keepsight.vismem import VisMemBranch, VisMemConfig, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def latents(model, inputs):
    out = generate(model, inputs, memory=forced())
    return [i.latents for row in out.invocations for i in row], torch.stack(out.logits)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True)) and torch.equal(a[1], b[1])


def test_save_then_load_equals_before(any_name, tmp_path):
    model, inputs = built(any_name, num_short=2)
    before = latents(model, inputs)
    model.save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert all("vismem_memory" in n and ".default." not in n for n in names)
    family = BY_NAME[any_name]
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(family.build(), tmp_path, **options).eval()
        assert same(latents(loaded, inputs), before)


def test_transformers_load_adapter_equals_before(name, tmp_path):
    model, inputs = built(name, num_short=2)
    before = latents(model, inputs)
    model.save_pretrained(tmp_path)
    plain = BY_NAME[name].build()
    plain.load_adapter(str(tmp_path))
    assert same(latents(plain, inputs), before)


def test_add_set_delete_disable(name):
    model, inputs = built(name)
    base = generate(BY_NAME[name].build(), inputs).sequences
    first = latents(model, inputs)
    model.add_adapter("second", VisMemConfig(**(SIZES | {"num_long": 3})))
    assert same(latents(model, inputs), first)  # added, not active
    strengthen(model, "second")
    model.set_adapter("second")
    second = latents(model, inputs)
    assert len(second[0][0]) == 3
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(keepsight.KeepsightError, match="Several VisMem adapters"):
        generate(model, inputs, memory=forced())
    model.set_adapter("default")
    model.delete_adapter("second")
    assert same(latents(model, inputs), first)
    with model.disable_adapter():
        assert torch.equal(generate(model, inputs).sequences, base)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(keepsight.MergeError, match="cannot be merged"):
            merge()


def test_copies_work_by_themselves(name):
    model, inputs = built(name)
    before = latents(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        VisMemBranch.of(model).active.long_gain.zero_()
    assert same(latents(twin, inputs), before)
    assert twin.get_base_model().generate.__self__ is VisMemBranch.of(twin)
    again = pickle.loads(pickle.dumps(VisMemBranch.of(twin).active))
    assert isinstance(again, torch.nn.Module)


@pytest.mark.parametrize("first", ["pvm", "vismem"])
def test_beside_pvm_and_lora(name, first, tmp_path):
    family = BY_NAME[name]
    model = family.build()
    inputs = make_inputs(family, model, ROWS)
    torch.manual_seed(3)
    decoder = re.escape(Backbone.of(model).decoder_path)
    with_lora = get_peft_model(
        model, LoraConfig(target_modules=rf"{decoder}\..*(q_proj|up_proj)", init_lora_weights=False)
    )
    steps = {
        "pvm": lambda: attach_pvm(model, adapter_name="pvm"),
        "vismem": lambda: attach(model, adapter_name="latent"),
    }
    wrapped = {key: steps[key]() for key in sorted(steps, key=lambda k: k != first)}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for part in ("lora_", "pvm_blocks", "vismem_memory"):
        assert any(part in n for n in trainable)
    for anyone in (*wrapped.values(), with_lora):  # whoever is asked generates with memory
        out = generate(anyone, inputs, memory=forced())
        assert [len(row) for row in out.invocations] == [1, 2, 0]
    cached = torch.stack(out.logits, 1)
    torch.testing.assert_close(at_choices(out, cached), at_choices(out, uncached(model, inputs, out)), **CLOSE)
    with wrapped["pvm"].disable_adapter():  # switches PVM only; the memory is formed from what it makes of the prompt
        without = generate(wrapped["vismem"], inputs, memory=forced())
    assert [len(row) for row in without.invocations] == [1, 2, 0]
    assert not torch.allclose(without.logits[0], out.logits[0])

    before = latents(model, inputs)
    wrapped["pvm"].save_pretrained(tmp_path, selected_adapters=["pvm"])
    wrapped["vismem"].save_pretrained(tmp_path, selected_adapters=["latent"])
    with_lora.save_pretrained(tmp_path / "lora", selected_adapters=["default"])
    assert not any("vismem" in n or "lora" in n for n in load_file(tmp_path / "pvm" / "adapter_model.safetensors"))
    assert not any("pvm" in n or "lora" in n for n in load_file(tmp_path / "latent" / "adapter_model.safetensors"))
    again = family.build()
    PeftModel.from_pretrained(again, tmp_path / "lora")
    for key in ("latent", "pvm"):
        PeftModel.from_pretrained(again, tmp_path / key, adapter_name=key)
    assert same(latents(again.eval(), inputs), before)
    wrapped["vismem"].unload()
    assert "generate" not in vars(model)
    assert any("pvm_blocks" in n for n, _ in model.named_parameters())


def test_trainable_parameters_and_groups(name):
    model, _ = built(name)
    assert all(("vismem_memory" in n) == p.requires_grad for n, p in model.named_parameters())
    rest, ends = parameter_groups(model, lr=1e-3)
    total = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in (rest, ends) for p in g["params"]} == total
    assert ends["lr"] < rest["lr"]
    rows = VisMemBranch.of(model).active.rows
    assert {id(p) for p in ends["params"]} == {id(p) for n, p in rows.named_parameters() if n.startswith("end_")}


def test_another_base_and_other_names_are_refused(tmp_path):
    model, _ = built("qwen3_vl")
    model.save_pretrained(tmp_path)
    with pytest.raises(keepsight.AdapterMismatchError, match="model_type qwen3_vl, here qwen2_5_vl"):
        PeftModel.from_pretrained(BY_NAME["qwen2_5_vl"].build(), tmp_path)
    with pytest.raises(keepsight.KeepsightError, match="adapter_name='memory'"):
        attach(attach_pvm(BY_NAME["qwen3_vl"].build()).get_base_model())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_querys": 8}, "Did you mean 'num_queries'"),
        ({"num_long": 0}, "positive whole number"),
        ({"num_short": 2.5}, "num_short=2.5: expected a whole number"),
        ({"untied_rows": "no"}, "untied_rows=.no.: expected true or false"),
        ({"short_alpha": float("inf")}, "short_alpha=inf: expected a finite number"),
        ({"token_ids": ["1", "2", "3", "4"]}, "expected a list of whole numbers or None"),
        ({"max_text_states": -1}, "positive whole number"),
        ({"short_targets": ["mlp"]}, "q_proj, k_proj, v_proj, o_proj"),
        ({"long_targets": []}, "expected some of"),
        ({"form": "incremental"}, "train this memory anew"),
        ({"slot_layout": "ring"}, "'strip', 'grid'"),
        ({"policy": "always"}, "expected one of"),
        ({"policy": "forced"}, "named with each call"),
        ({"min_words": -1}, "from 0"),
        ({"min_words": 1.5}, "whole number"),
        ({"max_invocations": 0}, "policy='off'"),
        ({"long_dropout": 1.0}, "from 0 to 1"),
        ({"query_width": 12, "query_heads": 8}, "multiple of query_heads"),
        ({"token_names": ["a", "a", "b", "c"]}, "four different"),
        ({"token_ids": [1, 2, 3]}, "four different"),
        ({"delimiters": []}, "at least one"),
    ],
)
def test_bad_settings_are_lessons(setting, message):
    with pytest.raises(ValueError, match=message):
        VisMemConfig(**setting)


def test_a_configuration_of_before_is_read():
    """There were two forms once; what was trained in the one that is left is what it was."""
    assert VisMemConfig(form="literal", num_long=3) == VisMemConfig(num_long=3)
    assert "form" not in VisMemConfig(form="literal").to_dict()


def test_keepsight_load(tmp_path):
    """Base, PVM and VisMem come back together, with a processor that knows the tokens; damaged files are refused."""
    base = tmp_path / "base"
    save_reference(build_model(seed=1), base)
    model, processor = keepsight.load(base)
    vocabulary = len(processor.tokenizer)
    with_memory = attach(model, adapter_name="latent")
    ids = keepsight.vismem.add_memory_tokens(processor, model)
    assert len(processor.tokenizer) == vocabulary + 4
    with_memory.save_pretrained(tmp_path, selected_adapters=["latent"])
    attach_pvm(model, adapter_name="pvm", layers=[1]).save_pretrained(tmp_path, selected_adapters=["pvm"])
    text = processor.tokenizer("hello", return_tensors="pt")
    out = generate(model, dict(text), memory=forced({0: "long"}), logits_processor=None)

    for sources in ([tmp_path / "latent", tmp_path / "pvm"], [tmp_path / "pvm", tmp_path / "latent"]):
        again, saved = keepsight.load(*sources)
        assert {k: saved.tokenizer.convert_tokens_to_ids(k) for k in ids} == ids
        assert {c.peft_type.value for c in again.get_base_model().peft_config.values()} == {"PVM", "VISMEM"}
        found = generate(again, dict(text), memory=forced({0: "long"}), logits_processor=None)
        assert torch.equal(found.sequences, out.sequences)
        torch.testing.assert_close(found.invocations[0][0].latents, out.invocations[0][0].latents, **CLOSE)
    _, saved = keepsight.load(tmp_path / "latent")
    assert len(saved.tokenizer) == vocabulary + 4
    saved.save_pretrained(tmp_path / "latent")  # a processor beside the adapter is used as it is
    _, kept = keepsight.load(tmp_path / "latent")
    assert len(kept.tokenizer) == vocabulary + 4

    file = tmp_path / "latent" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(n for n in tensors if "long_slots" in n))
    save_file(tensors, file)
    with pytest.raises(keepsight.BrokenAdapterError, match="long_slots"):
        keepsight.load(tmp_path / "latent")
