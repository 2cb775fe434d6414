"""The shipped checkpoint: an ordinary folder, small, that reads unseen digits and writes sensible narrations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

import keepsight
from keepsight.lab.digits import CELLS, draw_grids
from keepsight.lab.narration import prompt_messages
from keepsight.lab.pretraining import PRETRAINING_RECORD, PretrainConfig, short_accuracy
from keepsight.lab.reference import load_reference
from keepsight.pvm import PvmConfig
from keepsight.shipped import REFERENCE_NAME, reference_path, resolve_base


@pytest.fixture(scope="module")
def reference():
    return load_reference()


def test_the_folder_is_an_ordinary_checkpoint():
    model = AutoModelForImageTextToText.from_pretrained(reference_path())
    processor = AutoProcessor.from_pretrained(reference_path())
    assert type(model) is Qwen3VLForConditionalGeneration
    assert type(processor) is Qwen3VLProcessor
    assert model.dtype == torch.float32
    assert (processor.image_processor.patch_size, processor.image_processor.merge_size) == (4, 2)
    weights = reference_path() / "model.safetensors"
    assert weights.stat().st_size < 1_600_000
    with safe_open(weights, "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert "/" not in json.dumps(json.loads((reference_path() / "config.json").read_text()))


def test_it_reads_handwriting_it_has_never_seen(reference):
    assert short_accuracy(*reference, rows=64, split="test") > 0.93


def test_it_is_the_default_recipe():
    record = json.loads((reference_path() / PRETRAINING_RECORD).read_text())
    assert record["config"] == vars(PretrainConfig())


def test_adapters_find_their_base_on_every_machine(reference, tmp_path):
    from peft import LoraConfig, get_peft_model

    recorded = {}
    for name, config in (("memory", PvmConfig()), ("lora", LoraConfig(target_modules=["q_proj"]))):
        get_peft_model(load_reference()[0], config).save_pretrained(tmp_path / name)
        recorded[name] = json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert recorded["memory"] == REFERENCE_NAME
    elsewhere = "/somebody/site-packages/keepsight/lab/weights/reference"  # PEFT's own methods record a path
    assert {resolve_base(name) for name in (*recorded.values(), elsewhere)} == {reference_path()}
    assert resolve_base("somebody/else") == "somebody/else"


@pytest.mark.parametrize("prompt", ["read", "Read the digits, please."])
def test_left_to_itself_it_states_facts_and_stops(reference, prompt):
    model, processor = reference
    images, digits = draw_grids(4, "test", np.random.default_rng(0))
    text = processor.apply_chat_template(prompt_messages(prompt), tokenize=False, add_generation_prompt=True)
    right = total = stopped = 0
    for image, row in zip(images, digits, strict=True):
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=120)[0, inputs["input_ids"].shape[1] :]
        stopped += ids[-1].item() == processor.tokenizer.eos_token_id
        words = processor.decode(ids, skip_special_tokens=True).split()
        assert len(words) % 3 == 0  # facts and nothing else: cell, digit, full stop
        for cell, digit, stop in zip(*[iter(words)] * 3, strict=True):
            assert cell in CELLS
            assert stop == "."
            right += digit == str(row[CELLS.index(cell)])
            total += 1
    assert total >= 16
    assert right / total > 0.9
    assert stopped >= 3


def test_any_image_will_do(reference):
    model, processor = reference
    image = draw_grids(1, "test", np.random.default_rng(1))[0][0].resize((300, 300))
    text = processor.apply_chat_template(prompt_messages("read"), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_the_path_needs_no_extra():
    """`keepsight.load` finds the reference without scikit-learn, matplotlib or Pillow."""
    code = (
        "import sys\n"
        "for name in ('sklearn', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
        "import keepsight.lab.reference as r; print(r.reference_path())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "transformers" not in done.stderr
    assert done.stdout.strip() == str(reference_path())


def test_where_the_core_alone_is_installed_its_error_names_the_libraries_that_read_images(tmp_path):
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(("pil", "torchvision")):
            (tmp_path / entry.name).symlink_to(entry)
    path = f"{tmp_path}{os.pathsep}{Path(keepsight.__file__).parents[1]}"
    code = f"import keepsight; keepsight.load({REFERENCE_NAME!r})"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    lesson = done.stderr.strip().splitlines()[-1]
    assert "Images are read with Pillow and torchvision. Install it: pip install" in lesson
    assert "[lab]" in lesson


def test_a_folder_without_a_checkpoint_is_a_lesson(tmp_path):
    with pytest.raises(FileNotFoundError, match="keepsight lab pretrain"):
        load_reference(tmp_path)
