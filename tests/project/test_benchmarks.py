"""The benchmarks run, write what they promise, and time variants that compute the same. No timing is asserted."""

import dataclasses
import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import torch_counts_attention

FOLDER = Path(__file__).parents[2] / "benchmarks"


sys.path.insert(0, str(FOLDER))  # as Python does for `python benchmarks/decode.py`
decode = importlib.import_module("decode")


@pytest.fixture(scope="module", params=["dynamic", "static", "graph"])
def report(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("decode")
    flags = {"dynamic": [], "static": ["--static", "--batch", "2"], "graph": ["--graph", "--batch", "2"]}[request.param]
    file = decode.main(["--quick", "--device", "cpu", "--out", str(out), "--note", "a test", *flags])
    assert [p.relative_to(out).as_posix() for p in out.rglob("*.json")] == [
        f"quick/{file.name}"
    ]  # never beside a result
    return json.loads(file.read_text())


def test_report_has_samples_and_conditions(report: Any) -> None:
    assert report["quick"] is True
    for name in ("date", "command", "commit", "device", "cores", "torch_threads", "torch", "transformers"):
        assert report["conditions"][name], name
    assert report["conditions"]["note"] == "a test"
    settings = report["settings"]
    assert settings["dtype"] == "float32"
    assert settings["pvm_layers"] == [1, 2, 3]
    assert settings["pvm_parameters"] > 0
    assert [r["visual_tokens"] for r in report["results"]] == [16, 64]
    for result in report["results"]:
        samples = result["samples_ms_per_token"]
        more = {"beside", "fused", "fused-beside"} if "graph" in settings["mode"] else set()
        assert samples.keys() == {"base", "pvm", "reprojected"} | more
        assert all(len(values) == settings["rounds"] and min(values) > 0 for values in samples.values())


def test_summary_follows_from_the_samples(report: Any) -> None:
    for result in report["results"]:
        samples, summary = result["samples_ms_per_token"], result["summary"]
        for name, values in samples.items():
            shown = summary["ms_per_token"][name]
            assert (shown["min"], shown["median"], shown["max"]) == (
                min(values),
                statistics.median(values),
                max(values),
            )
            paired = [a / b for a, b in zip(values, samples["base"], strict=True)]
            assert summary["ratio_to_base"][name]["median"] == pytest.approx(statistics.median(paired))
        assert set(summary["ratio_to_base"]["base"].values()) == {1.0}


def test_reprojection_gives_the_cached_logits(report: Any) -> None:
    for result in report["results"]:
        check = result["logits_check"]
        assert check["max_difference_pvm_reprojected"] <= 1e-5 * check["largest_logit"]
        assert check["max_difference_pvm_base"] > 1e-2


def test_reprojection_computes_more(report: Any) -> None:
    rows = report["settings"]["batch"]
    for result in report["results"]:
        if "graph" not in report["settings"]["mode"]:
            counts = {name: c["operations"] for name, c in result["operations_per_step"].items()}
            assert counts["base"] < counts["pvm"] < counts["reprojected"]
        floor = result["bytes_floor"]
        assert 0 < floor["pvm_adds"] < floor["reprojected_adds"]
        assert floor["pvm_over_base"] == pytest.approx(1 + floor["pvm_adds"] / floor["base"])
    small, large = (r["bytes_floor"]["pvm_adds"] for r in report["results"])
    states = rows * 3 * 2 * (64 - 16) * 2 * 64 * 4  # blocks, keys and values, tokens, KV heads, head size, bytes
    assert large - small == states


def test_a_captured_step_is_the_step() -> None:
    """A graph moves token, position and the cache's length on by itself, and computes what `Decoder` computes."""
    models = decode.build_models(decode.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    how = (models, 16, 8, 2, 4, torch.device("cpu"))
    kinds = (decode.Decoder, decode.GraphDecoder)
    plain, graph = (decode.make_decoders(*how, kind, None, True, tuple(decode.SCOPES)) for kind in kinds)
    expected = {name: [decoder.step().clone() for _ in range(4)] for name, decoder in plain.items()}
    for name, decoder in graph.items():
        for step in expected["pvm" if name in decode.SCOPES else name]:  # on a CPU
            assert torch.equal(step, decoder.step())


def test_ceilings_are_measured() -> None:
    found = importlib.import_module("shared.measuring").ceilings(torch.device("cpu"), rounds=2)
    assert found.keys() == {"copy_bytes_per_second", "matmul_operations_per_second"}
    assert min(found.values()) > 0


def test_a_memory_that_is_not_read_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("shared.decoding"), "GATE", 0.0)
    with pytest.raises(RuntimeError, match="not being read"):
        decode.main(["--quick", "--device", "cpu", "--visual-tokens", "16", "--out", str(tmp_path)])


def test_wrong_reprojection_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = decode.Decoder.__init__

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        if self.reproject:
            self.packed = self.packed.roll(1, 2)

    monkeypatch.setattr(decode.Decoder, "__init__", forgetful)
    with pytest.raises(RuntimeError, match="differ from pvm's"):
        decode.main(["--quick", "--device", "cpu", "--visual-tokens", "16", "--out", str(tmp_path)])


def test_real_shapes_have_the_published_sizes() -> None:
    for name, parameters in (("4b", 22_728_963), ("8b", 27_922_179)):
        with torch.device("meta"):
            base, pvm = decode.build_models(decode.SHAPES[name], torch.bfloat16, torch.device("meta"))
        blocks = decode.blocks_of(pvm)
        assert sum(p.numel() for block in blocks.values() for p in block.parameters()) == parameters
        shared = {id(p) for n, p in pvm.named_parameters() if "pvm_" not in n}
        assert shared == {id(p) for p in base.parameters()}
    text = sum(p.numel() for p in base.parameters())
    assert 8.1e9 < text < 8.3e9


def committed() -> list[Path]:
    return sorted((FOLDER / "results" / "decode").glob("*.json"))


@pytest.mark.parametrize("file", committed(), ids=lambda file: file.stem)
def test_committed_results_are_whole(file: Path) -> None:
    report = json.loads(file.read_text())
    assert report["quick"] is False
    assert report["conditions"]["measured_code_changed_since_commit"] is False
    assert "/" not in report["conditions"]["command"].replace("benchmarks/", "")
    for result in report["results"]:
        assert decode.summarise(result["samples_ms_per_token"]) == result["summary"]


def test_all_of_a_gpus_benchmarks_in_one_go(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rehearsed: a step that ends, one that fails and one that is stopped; each says so in the table."""
    gpu = importlib.import_module("gpu")
    step = next(step for step in gpu.STEPS if step.kind == "decode")
    changes = {
        "ended": {"limit": 900},  # a busy machine's
        "failed": {"limit": 900, "script": "gpu.py", "rehearsal": "--no-such-option"},
        "stopped": {"limit": 0.1},
        "helped": {"limit": 900, "script": "gpu.py", "rehearsal": "--help"},
    }
    steps = tuple(dataclasses.replace(step, name=name, **change) for name, change in changes.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STEPS", steps)
        assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
        assert gpu.main(["--rehearse", "--out", str(tmp_path), "--only", "helped"]) == 0
    table = capfd.readouterr().out
    assert "done in" in table
    assert "failed (exit 2)" in table
    assert "stopped after" in table
    assert table.count("nothing was written") == 4
    assert [path.name for path in tmp_path.rglob("*.json")] == ["ended.json"]


def test_the_limits_of_a_gpus_benchmarks_fit_nine_minutes() -> None:
    assert sum(step.limit for step in importlib.import_module("gpu").STEPS) <= 9 * 60


def test_growth_counts_what_torch_counts() -> None:
    """The formulas of benchmarks/growth.py give the operations that really run."""
    if not torch_counts_attention():
        pytest.skip("this torch does not count attention on CPUs")
    growth = importlib.import_module("growth")
    for name, pair in growth.check(visual=64).items():
        assert pair["formula"] == pytest.approx(pair["counted"], rel=0.02), name


def test_growth_is_drawn_and_written(tmp_path: Path) -> None:
    growth = importlib.import_module("growth")
    report = growth.main(["--quick", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "quick" / "growth.json").read_text()) == json.loads(json.dumps(report))
    assert (tmp_path / "quick" / "growth.png").stat().st_size > 1000
    for axis, rows in report["growth"].items():
        assert [r["at"] for r in rows] == list(growth.AXES[axis])
        assert all(r["pvm_step"] > 0 and r["vismem_sample"] > 0 for r in rows)
