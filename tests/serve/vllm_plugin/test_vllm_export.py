"""`keepsight export vllm`: what the folder holds, and what is refused before anything is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import spoil, with_one_nan
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoProcessor
from typer.testing import CliRunner

import keepsight
from keepsight.checkpoints.adapters import inspect_adapter
from keepsight.cli import app
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.serve.vllm import check
from keepsight.serve.vllm import export as exporting
from keepsight.serve.vllm.export import ExportError, export_vllm
from keepsight.serve.vllm.latent_folder import write_model
from keepsight.shipped import reference_path

MEMORY, INDEX = "keepsight_memory.safetensors", "model.safetensors.index.json"


def saved(folder: Path, config: Any) -> Path:
    model, _ = keepsight.load("keepsight/reference")
    torch.manual_seed(0)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("memory"), keepsight.PvmConfig(layers=[1, 2], width=32, init_gate=0.5))


def test_the_folder_holds_the_base_and_the_memory(adapter: Path, tmp_path: Path) -> None:
    made = export_vllm(adapter, tmp_path / "out")
    out, base = made.folder, reference_path()
    config = json.loads((out / "config.json").read_text())
    plain = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["KeepsightQwen3VLForConditionalGeneration"]
    memory = config.pop("keepsight_pvm")
    assert {**config, "architectures": plain["architectures"]} == plain
    assert (memory["layers"], memory["width"], memory["causal"]) == ([1, 2], 32, True)
    assert AutoConfig.from_pretrained(out).keepsight_pvm == memory
    assert AutoProcessor.from_pretrained(out).tokenizer.get_vocab()

    assert (out / "model.safetensors").is_symlink()
    assert (out / "model.safetensors").samefile(base / "model.safetensors")
    theirs, ours = load_file(adapter / "adapter_model.safetensors"), load_file(out / MEMORY)
    assert {f"base_model.model.{name}" for name in ours} == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[f"base_model.model.{name}"])
    index = json.loads((out / INDEX).read_text())["weight_map"]
    assert {name for name, file in index.items() if file == MEMORY} == set(ours)
    assert {name for name, file in index.items() if file == "model.safetensors"} == set(
        load_file(base / "model.safetensors")
    )


def test_copied_weights_are_files_of_their_own(adapter: Path, tmp_path: Path) -> None:
    export_vllm(adapter, tmp_path / "out", weights="copy")
    copy = tmp_path / "out" / "model.safetensors"
    assert not copy.is_symlink()
    assert copy.read_bytes() == (reference_path() / "model.safetensors").read_bytes()


def test_an_export_is_never_loaded_without_its_memory(adapter: Path, tmp_path: Path) -> None:
    export_vllm(adapter, tmp_path / "out")
    with pytest.raises(KeepsightError, match=r"export for vLLM.*vllm serve.*load the adapter"):
        keepsight.load(tmp_path / "out")


def vismem(folder: Path) -> Path:
    return saved(folder, keepsight.VisMemConfig())


def lora(folder: Path) -> Path:
    return saved(folder, LoraConfig(r=2, target_modules=["down_proj"]))


REFUSED = {
    "vismem": (vismem, r"is a VisMem.*keepsight serve"),
    "control": (lambda f: saved(f, keepsight.PvmConfig(branch="mlp")), r"iso-parameter control.*no memory"),
    "published rule": (
        lambda f: saved(f, keepsight.PvmConfig(causal=False)),
        r"non-causal rule.*text before an image.*prefixes.*--allow-noncausal",
    ),
    "lora": (lora, r"exactly one PVM.*\(LORA\).*needs no export"),
    "plain model": (lambda f: reference_path(), r"exactly one PVM.*a plain model"),
    "nothing": (lambda f: f / "nowhere", r"no such folder"),
}


def with_its_embedding(folder: Path, config: Any) -> Path:
    """An adapter whose embedding is another than the base's."""
    model, _ = keepsight.load("keepsight/reference")
    model = get_peft_model(model, config)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(folder, save_embedding_layers=True)
    return folder


def test_an_embedding_of_the_adapters_own_is_not_left_behind(tmp_path: Path) -> None:
    """vLLM would read the base's; the way out that is named leads out."""
    vismem = inspect_adapter(with_its_embedding(tmp_path / "vismem", keepsight.VisMemConfig()))
    with pytest.raises(ExportError, match="brings an embedding of its own"):
        write_model("keepsight/reference", vismem, tmp_path / "out")
    adapter = with_its_embedding(tmp_path / "adapter", keepsight.PvmConfig(layers=[1], width=32))
    with pytest.raises(ExportError, match=r"brings an embedding.*save_embedding_layers=False.*--base FOLDER"):
        export_vllm(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model, processor = keepsight.load(adapter)
    table = model.get_input_embeddings().weight.clone()
    model.save_pretrained(tmp_path / "memory", save_embedding_layers=False)
    model.unload().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    with pytest.warns(KeepsightWarning, match="was trained on"):
        export_vllm(tmp_path / "memory", tmp_path / "out", base=tmp_path / "base")
    served = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(served["model.language_model.embed_tokens.weight"], table)


def test_a_base_that_is_not_finite_to_its_last_value_is_not_exported(adapter: Path, tmp_path: Path) -> None:
    base = spoil(reference_path(), tmp_path / "base", with_one_nan)
    with pytest.warns(KeepsightWarning), pytest.raises(KeepsightError, match="NaN or infinite"):
        export_vllm(adapter, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", REFUSED)
def test_what_vllm_cannot_serve_is_refused(what: str, tmp_path: Path) -> None:
    make, lesson = REFUSED[what]
    with pytest.raises((KeepsightError, FileNotFoundError), match=f"(?s){lesson}"):
        export_vllm(make(tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_published_rule_is_served_with_a_loud_warning_only(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "adapter", keepsight.PvmConfig(causal=False))
    with pytest.warns(KeepsightWarning, match=r"non-causal rule.*served by the causal rule.*answers can differ"):
        export_vllm(adapter, tmp_path / "out", allow_noncausal=True)


def test_two_memories_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="exactly one PVM"):
        export_vllm(adapter, tmp_path / "out", more=[adapter])


def test_a_folder_that_is_there(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_vllm(adapter, out)
    with pytest.raises(ExportError, match=r"exists.*--overwrite"):
        export_vllm(adapter, out)
    export_vllm(adapter, out, overwrite=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear diary")
    with pytest.raises(ExportError, match="not an earlier export"):
        export_vllm(adapter, mine, overwrite=True)
    with pytest.raises(ExportError, match="is a file"):
        export_vllm(adapter, mine / "diary.txt" / "out")
    assert [file.name for file in mine.iterdir()] == ["diary.txt"]


def test_whole_or_not_at_all(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export_vllm(adapter, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.os, "symlink", full)
    with pytest.raises(OSError, match="No space"):
        export_vllm(adapter, out, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_command(adapter: Path, tmp_path: Path) -> None:
    side = lora(tmp_path / "side")
    words = ["export", "vllm", str(adapter), str(tmp_path / "out"), "--lora", str(side)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert f"vllm serve {tmp_path / 'out'} --enable-lora --lora-modules side={side}" in result.stdout
    again = CliRunner().invoke(app, words, env={"COLUMNS": "200", "TERM": "dumb"})
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.32.0", None),
        ("0.32.1+cpu", None),
        ("0.33.0", None),
        ("0.31.0", "this is vLLM 0.31.0"),
        ("0.34.0", "this is vLLM 0.34.0"),
        ("0.320.1", "this is vLLM 0.320.1"),
        (None, "not installed"),
    ],
)
def test_the_minor_versions_of_vllm(version: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "installed_version", lambda: version)
    found = check.why_not()
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_the_plugin_leaves_an_environment_without_vllm_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from keepsight.serve.vllm.plugin import register

    monkeypatch.setattr(check, "installed_version", lambda: None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    register()


def test_the_folder_of_a_vismem_holds_the_base_and_four_rows(tmp_path: Path) -> None:
    """vLLM loads it where `keepsight serve --engine vllm` lets it write."""
    adapter = inspect_adapter(saved(tmp_path / "adapter", keepsight.VisMemConfig()))
    vocabulary = write_model("keepsight/reference", adapter, tmp_path / "out")
    plain = json.loads((reference_path() / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["KeepsightLatentQwen3VLForConditionalGeneration"]
    assert vocabulary == plain["text_config"]["vocab_size"] == config["text_config"]["vocab_size"] - 4
    assert config["keepsight_vismem"]["vocabulary"] == vocabulary
    theirs = load_file(adapter.path / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in theirs.items() if ".rows." in name}
    ours = load_file(tmp_path / "out" / "keepsight_tokens.safetensors")
    assert len(ours) == len(rows) > 3
    for name, tensor in ours.items():
        assert torch.equal(tensor, next(t for n, t in rows.items() if n.endswith(name.removeprefix("memory_rows"))))


def test_serving_with_vllm_says_what_is_missing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vismem = saved(tmp_path / "vismem", keepsight.VisMemConfig())

    def told(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["serve", *arguments, "--engine", "vllm"], env={"TERM": "dumb"})
        assert done.exit_code == 1
        return " ".join(done.output.split())

    monkeypatch.setattr(check, "installed_version", lambda: None)
    assert "vLLM is not installed" in told(str(vismem))
    monkeypatch.setattr(check, "installed_version", lambda: "0.32.0")
    assert "serves one VisMem and nothing beside it; given: PVM" in told(str(adapter))
    assert "given: VISMEM, PVM" in told(str(vismem), "-a", str(adapter))
    assert "is no JSON" in told(str(vismem), "--engine-args", "{half")
    assert "expected an object" in told(str(vismem), "--engine-args", "[1]")
