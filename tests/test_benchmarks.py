"""The benchmarks run, write what they promise, and time variants that compute the same. No timing is asserted."""

import importlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


sys.path.insert(0, str(FOLDER))  # as Python does for `python benchmarks/decode.py`
decode = importlib.import_module("decode")


@pytest.fixture(scope="module", params=["dynamic", "static"])
def report(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("decode")
    flags = ["--static"] if request.param == "static" else []
    file = decode.main(["--quick", "--device", "cpu", "--out", str(out), "--note", "a test", *flags])
    assert [p.name for p in out.iterdir()] == [file.name]
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
        assert samples.keys() == {"base", "pvm", "reprojected"}
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
    for result in report["results"]:
        counts = {name: c["operations"] for name, c in result["operations_per_step"].items()}
        assert counts["base"] < counts["pvm"] < counts["reprojected"]
        floor = result["bytes_floor"]
        assert 0 < floor["pvm_adds"] < floor["reprojected_adds"]
        assert floor["pvm_over_base"] == pytest.approx(1 + floor["pvm_adds"] / floor["base"])
    small, large = (r["bytes_floor"]["pvm_adds"] for r in report["results"])
    states = 3 * 2 * (64 - 16) * 2 * 64 * 4  # blocks, keys and values, tokens, KV heads, head size, bytes
    assert large - small == states


def test_a_memory_that_is_not_read_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("decoding"), "GATE", 0.0)
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
