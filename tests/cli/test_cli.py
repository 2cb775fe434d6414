"""The command line as a user meets it: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from processes import interruptible
from safetensors.torch import load_file, save_file
from tiny_training import FLAGS, draw_digit, read_rows, write_rows
from typer.testing import CliRunner, Result

import keepsight
from keepsight.cli import COMMANDS, app
from keepsight.train.sft import TrainReport

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Trained = tuple[Path, TrainReport]


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """The commands silence libraries; other tests should not inherit that."""
    level = transformers.logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    transformers.logging.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()


def keepsight_cli(*words: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})


def message(result: Result) -> str:
    """The one error message of a failed command; fails if there is more or less than that."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    draw_digit(3).save(tmp_path / "digit.png")
    return tmp_path / "digit.png"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------- help


def test_help_teaches() -> None:
    for words in ([], ["--help"], ["-h"]):
        result = keepsight_cli(*words)
        assert result.exit_code == 0
        assert "keepsight demo --quick" in result.stdout
        for name, (_, _, line, _) in COMMANDS.items():
            assert name in result.stdout
            assert line in result.stdout


@pytest.mark.parametrize("words", [["generate"], ["info"], ["train", "pvm"]])
def test_every_command_has_examples(words: list[str]) -> None:
    result = keepsight_cli(*words, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"keepsight {' '.join(words)}" in result.stdout


def test_version() -> None:
    assert keepsight_cli("--version").stdout == f"keepsight {keepsight.__version__}\n"


@pytest.mark.parametrize(
    ("words", "lesson"),
    [
        (["generate", "--imgae", "x"], "No such option"),
        (["generate"], "Missing option '--prompt'"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["generate", "-p", "x", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["train", "pvm", "x"], "Missing option"),
    ],
)
def test_usage_errors_point_to_the_help(words: list[str], lesson: str) -> None:
    result = keepsight_cli(*words)
    assert result.exit_code == 2
    assert lesson in result.stderr
    assert "How to use it: keepsight" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    result = keepsight_cli("train", "pvm", "x", "-d", "y", "-o", "z")
    assert 'pip install "keepsight[train]"' in message(result)


def test_a_missing_library_of_another_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "demo", ("needs_the_lab", "demo", "", "Start"))
    monkeypatch.setitem(sys.modules, "sklearn", None)

    class Finder:
        """Stands for a command whose file imports scikit-learn."""

        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name != "needs_the_lab":
                return None
            import importlib.util

            return importlib.util.spec_from_loader(name, Loader())

    class Loader:
        @staticmethod
        def create_module(spec: Any) -> None:
            return None

        @staticmethod
        def exec_module(module: Any) -> None:
            import sklearn  # noqa: F401

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert 'pip install "keepsight[lab]"' in message(keepsight_cli("demo"))


# ------------------------------------------------------------------------------------------------------------ generate


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


# ------------------------------------------------------------------------------------------- bad input, before loading


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which weights of a base are read."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)


def corrupt(image: Path, how: str) -> Path:
    if how == "missing":
        image.unlink()
    elif how == "no image":
        image.write_text("hello")
    elif how == "truncated":
        image.write_bytes(image.read_bytes()[:-30])
    elif how == "folder":
        image.unlink()
        image.mkdir()
    return image


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


def spoiled(adapter: Path, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / "spoiled"
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    if how == "truncated":
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    elif how == "not finite":
        tensors = load_file(copy / WEIGHTS)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, copy / WEIGHTS)
    elif how == "no weights":
        (copy / WEIGHTS).unlink()
    elif how == "no config":
        (copy / CONFIG).unlink()
    elif how == "bad json":
        (copy / CONFIG).write_text("{")
    else:
        config = json.loads((copy / CONFIG).read_text())
        config |= {"base_hidden_size": 4096} if how == "other base" else {"base_model_name_or_path": "/gone/model"}
        (copy / CONFIG).write_text(json.dumps(config))
    return copy


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
    assert "q_proj got a LORA of shape (4, 64), and the layer there is (64, 96)" in text


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


@pytest.mark.usefixtures("no_loading")
def test_a_model_of_an_unknown_family(tmp_path: Path, image: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path / "llama")
    text = message(keepsight_cli("generate", tmp_path / "llama", "-i", image, "-p", "x"))
    assert "(model_type 'llama') is not a VLM family" in text
    assert "Qwen3-VL (qwen3_vl)" in text


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


def test_a_base_with_nan(tiny_vlm: Path, data: Path, image: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vlm, tmp_path / "nan")
    weights = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.language_model.norm.weight"][:] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    result = keepsight_cli("generate", tmp_path / "nan", "-i", image, "-p", "x")
    assert result.exit_code == 1
    assert "The model computes NaN" in result.stderr
    result = keepsight_cli("train", "pvm", tmp_path / "nan", "-d", data, "-o", tmp_path / "out", *FLAGS)
    assert result.exit_code == 1
    assert "nan at the very first step" in result.stderr


# ---------------------------------------------------------------------------------------------------------------- info


def test_info_of_an_adapter(trained: Trained, tiny_vlm: Path) -> None:
    folder, report = trained
    facts = json.loads(keepsight_cli("info", folder, "--json").stdout)
    assert facts["method"] == "PVM"
    assert facts["base"] == str(tiny_vlm)
    assert facts["parameters"] == report.trainable
    assert facts["causal"] is True
    assert {int(layer): gate for layer, gate in facts["gates"].items()} == pytest.approx(report.gates)
    shown = keepsight_cli("info", folder).stdout
    assert f"{report.trainable:,}" in shown
    assert "gate of layer 1" in shown


def test_info_of_a_model_counts_what_training_makes(trained: Trained, tiny_vlm: Path) -> None:
    facts = json.loads(keepsight_cli("info", tiny_vlm, "--json").stdout)
    assert facts["memory"]["parameters"] == trained[1].trainable
    assert facts["parameters"] == trained[1].frozen
    assert facts["family"] == "Qwen3-VL"


@pytest.mark.usefixtures("no_loading")
def test_info_needs_a_configuration_only(tmp_path: Path) -> None:
    from families import FAMILIES

    for family in FAMILIES:
        family.config().save_pretrained(tmp_path / family.name)
        result = keepsight_cli("info", tmp_path / family.name)
        assert result.exit_code == 0, result.output
        assert "PvmConfig() gives" in result.stdout


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "ffn", "blocks", "parameters"),
    [(36, 4096, 32, 12288, [8, 16, 24], 27_922_179), (36, 2560, 32, 9728, [5, 11, 17], 22_728_963)],
)
def test_info_knows_the_papers_sizes(
    layers: int, hidden: int, heads: int, ffn: int, blocks: list[int], parameters: int, tmp_path: Path
) -> None:
    text = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn}
    config = transformers.Qwen3VLConfig(text_config=text | {"num_key_value_heads": 8, "head_dim": 128})
    config.save_pretrained(tmp_path / "big")
    facts = json.loads(keepsight_cli("info", tmp_path / "big", "--json").stdout)
    assert facts["memory"]["layers"] == blocks
    assert facts["memory"]["parameters"] == parameters


@pytest.mark.parametrize("how", ["truncated", "not finite", "bad json"])
def test_info_of_a_broken_adapter(how: str, trained: Trained, tmp_path: Path) -> None:
    message(keepsight_cli("info", spoiled(trained[0], tmp_path, how)))


# --------------------------------------------------------------------------------------------------------------- train


def test_train_pvm(tiny_vlm: Path, data: Path, tmp_path: Path, image: Path) -> None:
    out = tmp_path / "out"
    flags = ["--layers", "1,3", "--width", 32, "--published-rule", "--blindfold-steps", 3, "--seed", 7]
    result = keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", out, *FLAGS, *flags)
    assert result.exit_code == 0, result.output
    assert "no bit of any tensor changed" in result.stdout
    assert re.search(
        r"step 12/12  loss [\d.]+  token accuracy [\d.]+  lr [\d.e-]+  memory grad [\d.e+-]+  tokens [\d,]+  "
        r"tokens/s [\d,]+  gates 1:",
        result.stderr,
    )
    facts = json.loads(keepsight_cli("info", out, "--json").stdout)
    assert facts["layers"] == [1, 3]
    assert facts["width"] == 32
    assert facts["causal"] is False
    assert f"{facts['parameters']:,} parameters" in result.stdout
    used = keepsight_cli("generate", out, "-i", image, "-p", "describe", "--max-new-tokens", 2)
    assert used.exit_code == 0, used.output


def broken_image(data: Path) -> None:
    corrupt(data.parent / "3.png", "truncated")


def missing_image(data: Path) -> None:
    (data.parent / "3.png").unlink()


def missing_column(data: Path) -> None:
    write_rows(data, [{"messages": row["messages"]} for row in read_rows(data)])


def empty_dataset(data: Path) -> None:
    data.write_text("")


def without_images(data: Path) -> None:
    write_rows(data, [row | {"images": []} for row in read_rows(data)])


def missing_dataset(data: Path) -> None:
    data.unlink()


def miscounted(data: Path) -> None:
    write_rows(data, [row | {"images": row["images"] * 2} if i == 3 else row for i, row in enumerate(read_rows(data))])
    rows = read_rows(data)
    rows[3]["messages"][0]["content"] = "<image> describe"
    write_rows(data, rows)


@pytest.mark.parametrize(
    ("spoil", "lesson"),
    [
        (broken_image, "line 4, images[0]:"),
        (missing_image, "line 4, images[0]:"),
        (missing_column, 'lacks the column "images"'),
        (empty_dataset, "is empty"),
        (without_images, "no image; a sample without one teaches the memory nothing"),
        (missing_dataset, "no such file or folder"),
        (miscounted, "line 4, messages: 1 image placeholder for 2 images"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("flag", [["--resume"], ["--overwrite"]], ids=lambda flag: flag[0])
@pytest.mark.usefixtures("no_loading")
def test_bad_data_costs_nothing(
    spoil: Any, lesson: str, flag: list[str], trained: Trained, tiny_vlm: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    before = files_of(out)
    spoil(data)
    assert lesson in message(keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", out, *FLAGS, *flag))
    assert files_of(out) == before


@pytest.mark.usefixtures("no_loading")
def test_an_output_folder_that_holds_something(trained: Trained, tiny_vlm: Path, data: Path) -> None:
    before = files_of(trained[0])
    text = message(keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", trained[0], *FLAGS))
    assert "--resume" in text
    assert "--overwrite" in text
    assert files_of(trained[0]) == before


@pytest.mark.parametrize(
    ("flags", "lesson"),
    [
        (["--layers", "a,b"], "--layers a,b: expected numbers"),
        (["--layers", "1,1"], "names a layer twice"),
        (["--layers", "99"], "out of range"),
        (["--width", "33"], "Try 32 or 48"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--lr", "0"], "expected a number above 0"),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_bad_flags(flags: list[str], lesson: str, tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert lesson in message(keepsight_cli("train", "pvm", tiny_vlm, "-d", data, "-o", out, *FLAGS, *flags))


# ----------------------------------------------------------------------------------------------------- real processes


def run(*words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "keepsight.cli", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def test_a_process_that_fails(trained: Trained, image: Path, tmp_path: Path) -> None:
    broken = spoiled(trained[0], tmp_path, "truncated")
    result = run("generate", broken, "-i", image, "-p", "x")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    debug = run("generate", broken, "-i", image, "-p", "x", "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_a_process_that_answers(trained: Trained, image: Path) -> None:
    result = run("generate", trained[0], "-i", image, "-p", "describe", "--max-new-tokens", 4)
    assert result.returncode == 0
    assert len(result.stdout.split()) == 4
    assert len(result.stderr.strip().splitlines()) == 1  # libraries are silent; ours is the line with the timing


def test_ctrl_c_ends_training_with_one_line(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["train", "pvm", tiny_vlm, "-d", data, "-o", out, "--max-steps", 100000, "--save-steps", 5]
    command = [sys.executable, "-m", "keepsight.cli", *(str(word) for word in words), "--keep-checkpoints", "2"]
    process = interruptible(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-5" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    lines = [line for line in stderr.strip().splitlines() if not line.startswith(("step", "16 samples are good"))]
    assert len(lines) == 1
    assert lines[0].startswith("interrupted: stopped by Ctrl-C.")
    assert "--resume" in lines[0]


@pytest.mark.parametrize(("device", "lesson"), [("gpu7", "not a device"), ("meta", "nothing can be computed there")])
def test_a_device_that_is_none_is_refused_before_anything_loads(device: str, lesson: str) -> None:
    result = keepsight_cli("generate", "--device", device, "--prompt", "read")
    assert lesson in message(result)
