"""Bad input is told in one line before any weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
import transformers
from command_line import CONFIG, WEIGHTS, Trained, corrupt, keepsight_cli, message, spoiled
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import FLAGS

import keepsight
from keepsight.errors import UnsupportedModelError


@pytest.mark.parametrize(
    ("how", "lesson"),
    [
        ("missing", "no such image file"),
        ("no image", "not an image that Pillow can read"),
        ("truncated", "damaged or cut off"),
        ("folder", "is a folder"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_bad_images(how: str, lesson: str, trained: Trained, image: Path) -> None:
    result = keepsight_cli("generate", trained[0], "--image", corrupt(image, how), "--prompt", "describe")
    assert lesson in message(result)
    assert "digit.png" in result.stderr


def test_a_picture_that_the_processor_refuses_is_named(image: Path, tmp_path: Path) -> None:
    strip = tmp_path / "strip.png"
    PIL.Image.new("RGB", (2048, 9)).save(strip)
    given = ("--image", image, "--image", strip, "--prompt", "describe")
    result = keepsight_cli("generate", "keepsight/reference", *given)
    assert "cannot read" in message(result)
    assert f"{strip} (2048 x 9 pixels)" in message(result)


@pytest.mark.parametrize(
    ("how", "lesson"),
    [
        ("truncated", "is not a whole safetensors file"),
        ("not finite", "are NaN or infinite"),
        ("no weights", f"holds no {WEIGHTS}"),
        ("no config", f"holds no {CONFIG}"),
        ("bad json", "is not valid JSON"),
        ("base gone", "which cannot be found"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_bad_adapters(how: str, lesson: str, trained: Trained, image: Path, tmp_path: Path) -> None:
    result = keepsight_cli("generate", spoiled(trained[0], tmp_path, how), "-i", image, "-p", "describe")
    assert lesson in message(result)


@pytest.mark.usefixtures("no_loading")
def test_an_adapter_of_another_base(trained: Trained, image: Path, tmp_path: Path) -> None:
    from families import BY_NAME

    BY_NAME["qwen3_vl"].build().save_pretrained(tmp_path / "other")
    text = message(keepsight_cli("generate", tmp_path / "other", "-a", trained[0], "-i", image, "-p", "x"))
    assert "was made for another base model" in text
    assert "hidden_size 96, here 64" in text
    result = keepsight_cli("generate", trained[0], "--base", tmp_path / "other", "-i", image, "-p", "x")
    assert "was made for another base model" in message(result)


def test_a_lora_of_another_base(tiny_vlm: Path, image: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    from families import BY_NAME

    other = BY_NAME["qwen3_vl"].build()
    lora = get_peft_model(other, LoraConfig(target_modules=["q_proj"], r=4))
    lora.save_pretrained(tmp_path / "lora")
    request.getfixturevalue("no_loading")
    text = message(keepsight_cli("generate", tiny_vlm, "-a", tmp_path / "lora", "-i", image, "-p", "x"))
    assert "was made for another base model" in text
    assert "q_proj.lora_A" in text
    assert "[4, 64]" in text
    assert "[4, 96]" in text


def test_a_base_of_the_same_shape_warns(trained: Trained, tiny_vlm: Path, image: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vlm, tmp_path / "twin")
    result = keepsight_cli(
        "generate", trained[0], "--base", tmp_path / "twin", "-i", image, "-p", "x", "--max-new-tokens", 2
    )
    assert result.exit_code == 0
    assert "warning:" in result.stderr
    assert "was trained on" in result.stderr


@pytest.mark.parametrize(
    ("source", "lesson"),
    [
        ("./nothing", "no such folder"),
        ("owner/nothing-of-the-kind", "no model of that name can be reached"),
        ("nothing", "A hub id looks like owner/name"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_a_source_that_is_not_there(source: str, lesson: str, image: Path) -> None:
    assert lesson in message(keepsight_cli("generate", source, "-i", image, "-p", "x"))
    assert lesson in message(keepsight_cli("info", source))


#: Ways into keepsight that take a model, behind its name.
DOORS = (
    ("info",),
    ("generate", "-i", "IMAGE", "-p", "x"),
    ("chat",),
    ("serve",),
    ("diagnose",),
    ("eval", "-d", "DATA"),
    ("train", "pvm", "-d", "DATA", "-o", "OUT"),
    ("train", "pvm", "-d", "DATA", "--dry-run"),
    ("train", "pvm-grpo", "-d", "DATA", "-o", "OUT"),
    ("train", "vismem-formation", "-d", "DATA", "-o", "OUT"),
    ("data", "check", "DATA", "--model"),
)
OTHERS = {
    "llama": "takes no images",
    "bert": "takes no images",
    "t5": "is an encoder-decoder",
    "llama4": "has no row for it yet",
    "mllama": "cross-attention",
    "kimi_vl": "trust_remote_code",
}


@pytest.mark.parametrize("model_type", OTHERS)
@pytest.mark.usefixtures("no_loading")
def test_a_model_of_an_unknown_family_is_refused_at_every_door(model_type: str, tmp_path: Path, image: Path) -> None:
    folder, data = tmp_path / "other", tmp_path / "data.jsonl"
    if model_type in transformers.CONFIG_MAPPING:
        transformers.CONFIG_MAPPING[model_type]().save_pretrained(folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "a.B"}}))
        (folder / "a.py").write_text("raise SystemExit('this code must not run')")
    save_file({"model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    data.write_text(json.dumps({"image": str(image), "prompt": "x", "answer": "1"}) + "\n")
    for door in DOORS:
        words = [{"IMAGE": image, "DATA": data, "OUT": tmp_path / "out"}.get(word, word) for word in door]
        place = len(words) if words[-1] == "--model" else 2 if words[0] == "train" else 1
        text = message(keepsight_cli(*words[:place], folder, *words[place:]))
        assert f"(model_type '{model_type}')" in text, door
        assert OTHERS[model_type] in text, door
        assert "Supported: Qwen3-VL, " in text, door
        assert "open an issue" in text, door
    with pytest.raises(UnsupportedModelError, match=re.escape(OTHERS[model_type])):
        keepsight.load(folder)


def test_a_processor_without_a_chat_template(tiny_vlm: Path, image: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vlm, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    assert "has no chat template" in message(keepsight_cli("generate", tmp_path / "mute", "-i", image, "-p", "x"))


@pytest.mark.parametrize(
    ("how", "lesson"),
    [("truncated", "is cut off or damaged"), ("empty", "is not a whole safetensors file"), ("gone", "are missing")],
)
@pytest.mark.usefixtures("no_loading")
def test_a_base_with_broken_weights(
    how: str, lesson: str, tiny_vlm: Path, data: Path, image: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_vlm, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100] if how == "truncated" else b"")
    if how == "gone":
        weights.unlink()
    assert lesson in message(keepsight_cli("generate", tmp_path / "broken", "-i", image, "-p", "x"))
    out = tmp_path / "out"
    assert lesson in message(keepsight_cli("train", "pvm", tmp_path / "broken", "-d", data, "-o", out))
    assert not out.exists()


def base_with_norm(tiny_vlm: Path, folder: Path, value: float) -> Path:
    shutil.copytree(tiny_vlm, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.language_model.norm.weight"][:] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_base_that_holds_no_numbers(tiny_vlm: Path, data: Path, image: Path, tmp_path: Path, value: float) -> None:
    base = base_with_norm(tiny_vlm, tmp_path / "spoiled", value)
    train = ("train", "pvm", base, "-d", data, "-o", tmp_path / "out", *FLAGS)
    for command in (("generate", base, "-i", image, "-p", "x"), train, ("info", base)):
        assert "model.language_model.norm.weight holds val" in message(keepsight_cli(*command))


def test_a_base_that_computes_nan(tiny_vlm: Path, data: Path, image: Path, tmp_path: Path) -> None:
    """Of numbers that are finite: nothing in the files tells of it."""
    base = base_with_norm(tiny_vlm, tmp_path / "nan", 3e38)
    result = keepsight_cli("generate", base, "-i", image, "-p", "x", "--dtype", "float32")
    assert result.exit_code == 1
    assert "The model computes NaN" in result.stderr
    result = keepsight_cli("train", "pvm", base, "-d", data, "-o", tmp_path / "out", "--dtype", "float32", *FLAGS)
    assert result.exit_code == 1
    assert "nan at the very first step" in result.stderr
