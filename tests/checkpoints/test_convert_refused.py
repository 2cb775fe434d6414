"""What `keepsight convert` refuses before anything is written, and what a failure leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_layout import (
    FFN,
    PREFIX,
    WIDTH,
    Converted,
    change_json,
    change_tensors,
)

import keepsight
from keepsight.checkpoints.convert import ConversionError, convert
from keepsight.checkpoints.shards import CheckpointError


def _set(*path: str, to: Any) -> Any:
    def change(folder: Path) -> None:
        def at(config: dict[str, Any]) -> None:
            for key in path[:-1]:
                config = config[key]
            config[path[-1]] = to

        change_json(folder / "config.json", at)

    return change


def _tensors(change: Any) -> Any:
    return lambda folder: change_tensors(folder, change)


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _spoil(name: str, value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return _tensors(change)


BLOCK = f"{PREFIX}3.pvm_block."
GATE_PROJ = BLOCK + "mlp.gate_proj.weight"
BASE_WEIGHT = f"{PREFIX}2.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "other family": (
        lambda f: change_json(f / "config.json", lambda c: c.update(model_type="llava", architectures=["Llava"])),
        "not a dense Qwen3-VL",
    ),
    "experts": (_set("model_type", to="qwen3_vl_moe"), "not a dense Qwen3-VL"),
    "no text config": (_set("text_config", to=None), "no text_config"),
    "nonsense config": (_set("text_config", "hidden_size", to="wide"), "cannot build a Qwen3-VL"),
    "other sizes": (_set("text_config", "intermediate_size", to=104), r"has shape .* config.json asks for"),
    "quantised": (_set("quantization_config", to={"bits": 4}), "quantised"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "pickle": (_only_pickle, "never reads it"),
    "truncated": (_truncate, "not a whole safetensors file"),
    "no memory": (
        _tensors(lambda t: [t.pop(n) for n in list(t) if ".pvm_block." in n]),
        "has no visual memory",
    ),
    "no pvm_layers": (_set("text_config", "pvm_layers", to=None), "pvm_layers is None"),
    "no width": (_set("text_config", "pvm_hidden_size", to=None), "pvm_hidden_size is None"),
    "wrong width": (_set("text_config", "pvm_hidden_size", to=48), "has shape"),
    "width of no heads": (_set("text_config", "pvm_hidden_size", to=40), "not a multiple of head_dim"),
    "other layers": (_set("text_config", "pvm_layers", to=[1, 2]), r"says pvm_layers \[1, 2\].*layers \[1, 3\]"),
    "a layer too many": (_set("text_config", "pvm_layers", to=[1, 2, 3]), r"says pvm_layers \[1, 2, 3\]"),
    "layer out of range": (
        lambda f: (
            change_tensors(
                f, lambda t: t.update({n.replace("s.3.p", "s.7.p"): t.pop(n) for n in list(t) if BLOCK in n})
            ),
            _set("text_config", "pvm_layers", to=[1, 7])(f),
        ),
        "out of range",
    ),
    "missing": (_tensors(lambda t: t.pop(GATE_PROJ)), f"lacks 1 of the 30 tensors of the memory.*{GATE_PROJ}"),
    "extra": (_tensors(lambda t: t.update({BLOCK + "new.weight": torch.ones(2)})), "no part of the memory.*new.weight"),
    "misshaped": (_tensors(lambda t: t.update({GATE_PROJ: torch.ones(FFN + 1, WIDTH)})), "gate_proj.weight has shape"),
    "base missing": (_tensors(lambda t: t.pop(BASE_WEIGHT)), f"tensors of the base model, the first: {BASE_WEIGHT}"),
    "base extra": (_tensors(lambda t: t.update({"model.other": torch.ones(2)})), "no part of the base model.*other"),
    "nan": (_spoil(GATE_PROJ, float("nan")), "1 of 1536 values.*gate_proj.weight are NaN"),
    "infinite base": (_spoil(BASE_WEIGHT, float("inf")), "up_proj.weight are NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_writing(case: str, single: Converted, tmp_path: Path) -> None:
    spoil, lesson = REFUSED[case]
    source = tmp_path / "in" / "authors"
    shutil.copytree(single.source, source)
    spoil(source)
    out = tmp_path / "place"
    out.mkdir()
    with pytest.raises(CheckpointError, match="(?s)" + lesson):
        convert(source, out / "new" / "out")
    assert list(out.iterdir()) == []


INDEX_CASES = {
    "shard missing": ({"a": "gone.safetensors"}, "not there"),
    "outside": ({"a": "../authors2/model.safetensors"}, "no safetensors file of this folder"),
    "pickled shard": ({"a": "pytorch_model.bin"}, "no safetensors file of this folder"),
    "empty": ({}, "no weight_map"),
}


@pytest.mark.parametrize("case", INDEX_CASES)
def test_broken_index(case: str, single: Converted, tmp_path: Path) -> None:
    weight_map, lesson = INDEX_CASES[case]
    shutil.copytree(single.source, tmp_path / "authors")
    (tmp_path / "authors" / "model.safetensors").unlink()
    (tmp_path / "authors" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=lesson):
        convert(tmp_path / "authors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_out(single: Converted, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"exists.*--overwrite"):
        convert(single.source, out)
    with pytest.raises(ConversionError, match="not the result of an earlier conversion"):
        convert(single.source, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"

    (out / "thesis.txt").unlink()
    (out / "base").mkdir()
    (out / "base" / "old.txt").write_text("old")
    convert(single.source, out, overwrite=True)
    assert not (out / "base" / "old.txt").exists()
    assert keepsight.load(out / "adapter", device="cpu")
    assert {p.name for p in tmp_path.iterdir()} == {"out"}

    for target in (single.source, single.source.parent):
        with pytest.raises(ConversionError, match=r"is SRC .* or holds it"):
            convert(single.source, target, overwrite=True)


def test_disk_too_small(single: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConversionError, match="GB free"):
        convert(single.source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [False, True])
def test_failure_while_writing_leaves_nothing(before: bool, single: Converted, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    if before:
        shutil.copytree(single.folder, out)
    kept = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))

    def fail(task: str, done: int, total: int) -> None:
        if task == "Writing" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(single.source, out, overwrite=before, progress=fail)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == kept


def test_progress_counts_every_byte(single: Converted, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    made = convert(single.source, tmp_path / "out", progress=lambda t, d, n: seen.setdefault(t, []).append((d, n)))
    assert list(seen) == ["Checking", "Writing"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]
    assert seen["Writing"][-1][1] == made.base_bytes


def test_unknown_memory_settings_are_named(single: Converted, tmp_path: Path) -> None:
    shutil.copytree(single.source, tmp_path / "authors")
    _set("text_config", "pvm_temperature", to=2.0)(tmp_path / "authors")
    with pytest.warns(keepsight.errors.KeepsightWarning, match="pvm_temperature"):
        convert(tmp_path / "authors", tmp_path / "out")
