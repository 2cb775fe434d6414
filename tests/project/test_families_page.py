"""docs/families.md says what the code does."""

import ast
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import BY_NAME, MORE, ROWS
from families import FAMILIES as TINY
from peft import get_peft_model
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

import keepsight
from keepsight.backbone import FAMILIES, PENDING, REMOTE, UNFIT, family_of
from keepsight.checkpoints.bases import base_config
from keepsight.errors import UnsupportedModelError


def tool():
    spec = importlib.util.spec_from_file_location("families_page", Path(__file__).parents[2] / "tools" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    made = tool()
    page = made.PAGE.read_text()
    assert made.written(page) == page, "run `python tools/families.py`"


def test_every_supported_family_is_tested():
    absent = {row.name for row in ROWS if row not in MORE}  # of this release of transformers
    assert {family.config().model_type for family in (*TINY, *MORE)} == set(FAMILIES) - absent


def test_every_vlm_of_transformers_is_accounted_for():
    """Supported, refused with its reason, or named as untried; and in one of these lists only."""
    listed = [*FAMILIES, *UNFIT, *REMOTE, *PENDING]
    assert len(listed) == len(set(listed))
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(listed)
    assert not set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) & set(REMOTE)


#: Classes that take images and write tokens, and are no VLM that people load to ask about an image.
PARTS = {
    "BlipForQuestionAnswering": "BLIP's other head",
    "GlmImageForConditionalGeneration": "makes images",
    "Kosmos2TextForCausalLM": "a part",
    "Kosmos2_5TextForCausalLM": "a part",
    "Qwen2_5OmniTalkerForConditionalGeneration": "speaks",
    "Qwen3OmniMoeTalkerForConditionalGeneration": "speaks",
}


def test_every_class_that_reads_images_and_writes_is_accounted_for():
    """Also of VLMs that are not in transformers' list of them: by what their forward takes, from the sources."""
    named = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    listed = {name for kind, name in named.items() if kind in {*FAMILIES, *UNFIT, *PENDING}}
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = file.read_text()
        if "GenerationMixin)" not in source:
            continue
        for part in ast.parse(source).body:
            if isinstance(part, ast.ClassDef) and "GenerationMixin" in map(ast.unparse, part.bases):
                forwards = [f for f in part.body if isinstance(f, ast.FunctionDef) and f.name == "forward"]
                taken = {argument.arg for f in forwards for argument in f.args.args}
                if any("pixel" in name or "image" in name for name in taken):
                    found.add(part.name)
    assert len(found) > 60
    assert found - listed - set(PARTS) == set()


def test_every_missing_vismem_has_its_reason():
    assert all("not described in keepsight yet" not in f.no_vismem for f in FAMILIES.values() if f.vision is None)


@pytest.mark.parametrize("model_type", [*REMOTE, "of_nobody"])
def test_a_model_with_code_of_its_own_is_told_so_and_its_code_is_not_run(model_type, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})
    )
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(UnsupportedModelError, match="trust_remote_code") as error:
        base_config(tmp_path)
    said = str(error.value)
    assert REMOTE.get(model_type, "") in said
    assert "Qwen3-VL, " in said
    assert "open an issue" in said


@pytest.mark.parametrize("model_type", [*UNFIT, *PENDING])
def test_a_family_without_a_place_for_a_memory_is_told_why(model_type):
    with pytest.raises(UnsupportedModelError, match="cannot be given a visual memory") as error:
        family_of(SimpleNamespace(model_type=model_type))
    assert (UNFIT | PENDING)[model_type] in str(error.value)
    assert "open an issue" in str(error.value)


class OfNobody(transformers.VideoLlavaConfig):
    """A VLM that transformers will have some day."""

    model_type = "of_nobody"


def tiny(kind):
    """Models that can have no memory, as people try them."""
    text = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    llama = transformers.LlamaConfig(**text, num_attention_heads=2)
    if kind == "language model":
        return transformers.LlamaForCausalLM(llama)
    if kind == "encoder-decoder":
        config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "part":
        return BY_NAME["qwen3_vl"].build().model.language_model
    if kind == "another VLM":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
        return transformers.VideoLlavaForConditionalGeneration(
            OfNobody(vision_config=vision, text_config=llama, vision_feature_layer=0)
        )
    return torch.nn.Linear(2, 2)


WHY = {
    "language model": "takes no images .* give a vision-language model",
    "encoder-decoder": "is an encoder-decoder",
    "part": r"is a part of Qwen3-VL \(qwen3_vl\)",
    "another VLM": "takes images, and is none of the model families that keepsight knows",
    "module": "is no model of transformers",
}


@pytest.mark.parametrize("config", [keepsight.PvmConfig, keepsight.VisMemConfig])
@pytest.mark.parametrize("kind", WHY)
def test_a_model_outside_the_list_is_told_why_what_is_supported_and_how_to_ask(kind, config):
    model = tiny(kind)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match=WHY[kind]) as error:
        get_peft_model(model, config())
    said = str(error.value)
    assert "Qwen3-VL, " in said
    assert "LLaVA-NeXT" in said
    assert kind == "module" or "open an issue" in said
    assert "tests/" not in said
    assert len(said) < 1200
    assert [name for name, _ in model.named_modules()] == before
