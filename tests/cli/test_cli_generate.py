"""`keepsight generate`: what it answers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import Trained, keepsight_cli, message
from peft import LoraConfig, get_peft_model
from tiny_training import draw_digit

import keepsight


def test_generate_streams_the_answer_to_stdout(trained: Trained, image: Path) -> None:
    result = keepsight_cli("generate", trained[0], "--image", image, "--prompt", "describe", "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    assert len(result.stdout.split()) == 8
    assert re.search(r"\[8 tokens in [\d.]+ s after a prompt of \d+; stopped at --max-new-tokens\]", result.stderr)
    again = keepsight_cli("generate", trained[0], "--image", image, "--prompt", "describe", "--max-new-tokens", 8)
    assert again.stdout == result.stdout


def test_generate_equals_the_library(trained: Trained, image: Path) -> None:
    result = keepsight_cli("generate", trained[0], "-i", image, "-i", image, "-p", "describe", "--max-new-tokens", 6)
    model, processor = keepsight.load(trained[0])
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "describe"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[draw_digit(3)] * 2], add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result.stdout.split() == processor.tokenizer.decode(tokens, skip_special_tokens=True).split()


def test_what_was_said_stands_between_image_and_prompt(trained: Trained, image: Path, tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    said.write_text("the digit is three\n")
    words = ["generate", trained[0], "-i", image, "-p", "describe", "--max-new-tokens", 6]
    result = keepsight_cli(*words, "--said", said)
    model, processor = keepsight.load(trained[0])
    turns = [
        ("user", {"type": "image"}),
        ("assistant", {"type": "text", "text": "the digit is three"}),
        ("user", {"type": "text", "text": "describe"}),
    ]
    text = processor.apply_chat_template(
        [{"role": role, "content": [part]} for role, part in turns], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[[draw_digit(3)]], add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result.stdout.split() == processor.tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert f"after a prompt of {inputs['input_ids'].shape[1]};" in result.stderr
    for broken, lesson in ((b" \n", "is empty"), (b"\xff\xfe\xfd", "not UTF-8"), (None, "Expected a text file")):
        said.unlink() if broken is None else said.write_bytes(broken)
        assert lesson in message(keepsight_cli(*words, "--said", said))
    said.write_text(f"an image: {processor.image_token}")
    assert f"--said {said} holds {processor.image_token}" in message(keepsight_cli(*words, "--said", said))
    assert "Give one by --image" in message(keepsight_cli("generate", trained[0], "-p", "x", "--said", said))


def test_an_answer_that_is_begun_goes_on(trained: Trained, image: Path, tmp_path: Path) -> None:
    """Begun with its own first words, an answer goes on with the rest, also behind something said before."""
    begun, said = tmp_path / "begun.txt", tmp_path / "said.txt"
    said.write_text("the digit is three")
    for more in ((), ("--said", said)):
        words = ["generate", trained[0], "-i", image, "-p", "describe", *more]
        whole = keepsight_cli(*words, "--max-new-tokens", 8).stdout.split()
        begun.write_text(" ".join(whole[:5]) + "\n")
        rest = keepsight_cli(*words, "--prefill", begun, "--max-new-tokens", 3)
        assert rest.stdout.split() == whole[5:], rest.output
        assert len(whole) == 8
    begun.write_text(" ")
    assert "--prefill" in message(keepsight_cli(*words, "--prefill", begun))
    begun.write_text(f"an image: {keepsight.load(trained[0])[1].image_token}")
    assert f"--prefill {begun} holds" in message(keepsight_cli(*words, "--prefill", begun))


def test_no_memory_gives_the_bases_answer(trained: Trained, tiny_vlm: Path, image: Path) -> None:
    words = ["-i", image, "-p", "describe", "--max-new-tokens", 8]
    with_memory = keepsight_cli("generate", trained[0], *words)
    without = keepsight_cli("generate", trained[0], *words, "--no-memory")
    base = keepsight_cli("generate", tiny_vlm, *words)
    assert without.stdout == base.stdout != with_memory.stdout


def test_sampling_repeats_by_seed(trained: Trained, image: Path) -> None:
    words = ["generate", trained[0], "-i", image, "-p", "describe", "--temperature", 2.0, "--max-new-tokens", 12]
    first, same, other = (keepsight_cli(*words, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == same != other


def test_a_memory_and_a_lora_together(trained: Trained, tiny_vlm: Path, image: Path, tmp_path: Path) -> None:
    base, _ = keepsight.load(tiny_vlm)
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    words = ["-i", image, "-p", "describe", "--max-new-tokens", 8]
    both = keepsight_cli("generate", tiny_vlm, "-a", trained[0], "-a", tmp_path / "lora", *words)
    assert both.exit_code == 0, both.output
    lora_alone = keepsight_cli("generate", tmp_path / "lora", *words)
    off = keepsight_cli("generate", tiny_vlm, "-a", trained[0], "-a", tmp_path / "lora", *words, "--no-memory")
    assert off.stdout == lora_alone.stdout
    info = keepsight_cli("info", tmp_path / "lora", "--json")
    assert json.loads(info.stdout)["method"] == "LORA"


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--seed", "3", "-i", "IMAGE"], "--seed has no effect at --temperature 0"),
        ([], "No --image is given"),
    ],
)
def test_generate_warns_of_what_has_no_effect(words: list[str], warning: str, trained: Trained, image: Path) -> None:
    words = [str(image) if word == "IMAGE" else word for word in words]
    result = keepsight_cli("generate", trained[0], "-p", "describe", "--max-new-tokens", 2, *words)
    assert result.exit_code == 0, result.output
    assert f"warning: {warning}" in result.stderr


def test_no_memory_without_a_memory_warns(tiny_vlm: Path, image: Path) -> None:
    result = keepsight_cli("generate", tiny_vlm, "-i", image, "-p", "x", "--max-new-tokens", 2, "--no-memory")
    assert "warning: --no-memory has no effect" in result.stderr


@pytest.mark.parametrize("command", [["generate", "-p", "x"], ["diagnose"], ["serve"]])
@pytest.mark.usefixtures("no_loading")
def test_an_adapter_that_is_given_twice(command: list[str], trained: Trained, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(trained[0], twin, ignore=shutil.ignore_patterns("checkpoint-*"))
    more = ["-o", tmp_path / "out"] if command == ["diagnose"] else []
    same = message(keepsight_cli(*command, *more, trained[0], "-a", trained[0]))
    assert "is given twice" in same
    other = message(keepsight_cli(*command, *more, trained[0], "-a", twin))
    assert "are both PVMs, and only one can be active" in other
