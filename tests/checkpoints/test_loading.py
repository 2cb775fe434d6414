"""`keepsight.load`: adapters, several at once, plain models, and lessons that come before any weight is read."""

import json
import shutil

import pytest
import torch
from helpers import LAYERS, attach
from peft import LoraConfig, get_peft_model
from PIL import Image

import keepsight
from keepsight.lab.reference import build_model, save_reference


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untrained reference VLM as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("base")
    save_reference(build_model(seed=1), folder)
    return folder


def see(model, processor):
    """Logits for one image and one prompt."""
    message = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (32, 32), "red")}]}
    message["content"].append({"type": "text", "text": "read"})
    inputs = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def memory(base, tmp_path_factory):
    """A saved memory of random weights, and the logits it gave before it was saved."""
    folder = tmp_path_factory.mktemp("memory")
    model, processor = keepsight.load(base)
    model = attach(model, layers=LAYERS, width=32)
    model.save_pretrained(folder)
    return folder, see(model, processor)


def test_plain_model(base):
    model, processor = keepsight.load(base)
    assert model.dtype == torch.float32  # a float16 checkpoint, on a CPU
    assert not model.training
    assert see(model, processor).shape[-1] == model.config.text_config.vocab_size


def test_adapter_alone_is_enough(memory):
    folder, before = memory
    model, processor = keepsight.load(folder)
    assert torch.equal(see(model, processor), before)
    assert not any(p.requires_grad for p in model.parameters())
    model, _ = keepsight.load(folder, trainable=True)
    assert all(("pvm_blocks" in n) == p.requires_grad for n, p in model.named_parameters())


def test_lora_and_memory(base, memory, tmp_path):
    folder, with_memory = memory
    model, processor = keepsight.load(base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    for order in ([tmp_path / "lora", folder], [folder, tmp_path / "lora"]):
        both, _ = keepsight.load(*order)
        found = see(both, processor)
        assert not torch.allclose(found, with_memory)
        assert not torch.allclose(found, see(model, processor))
    again, _ = keepsight.load(tmp_path / "lora", folder)
    assert torch.equal(see(again, processor), found)


def test_two_memories(memory, tmp_path):
    folder, before = memory
    shutil.copytree(folder, tmp_path / "copy.v2")
    model, processor = keepsight.load(folder, tmp_path / "copy.v2")
    assert torch.equal(see(model, processor), before)  # the first is active
    model.set_adapter("copy_v2")
    assert torch.equal(see(model, processor), before)


def test_wrong_base_is_refused_before_weights_are_read(memory, tmp_path):
    folder, _ = memory
    other = build_model(seed=1)
    save_reference(other, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["hidden_size"] = 192
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()  # would be missed if it were read
    with pytest.raises(keepsight.AdapterMismatchError, match="hidden_size 96, here 192"):
        keepsight.load(folder, base=tmp_path)


def test_a_latent_memory_of_another_base_is_refused_before_weights_are_read(base, tmp_path):
    model, _ = keepsight.load(base)
    get_peft_model(model, keepsight.VisMemConfig()).save_pretrained(tmp_path / "memory")
    shutil.copytree(base, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 128
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "model.safetensors").unlink()  # would be missed if it were read
    with pytest.raises(keepsight.AdapterMismatchError, match="vision_size 64, here 128"):
        keepsight.load(tmp_path / "memory", base=tmp_path / "other")


def test_unsupported_model_is_refused_before_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(keepsight.UnsupportedModelError, match="model_type 'llama'"):
        keepsight.load(tmp_path)


def test_lessons(base, memory, tmp_path):
    folder, _ = memory
    with pytest.raises(FileNotFoundError, match=r"neither a model .* nor an adapter"):
        keepsight.load(tmp_path)
    with pytest.raises(ValueError, match="no adapter, so the base"):
        keepsight.load(base, base=base)
    with pytest.raises(keepsight.BrokenAdapterError, match="is no adapter"):
        keepsight.load(folder, base)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(keepsight.BrokenAdapterError, match=r"holds no adapter_model\.safetensors.*pickled"):
        keepsight.load(broken)
    (broken / "adapter_config.json").write_text("{")
    shutil.copy(folder / "adapter_model.safetensors", broken)
    with pytest.raises(keepsight.BrokenAdapterError, match="not valid JSON"):
        keepsight.load(broken)
