"""A base in four bits: memories and LoRAs learn beside it, no packed bit changes, and what cannot be is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families.tiny import device
from safetensors.torch import load_file
from tiny_training import make_data, write_rows
from transformers import TrainerCallback

import keepsight
from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.installed import install_line
from keepsight.train.estimate.dry_run import dry_run
from keepsight.train.pvm.grpo import GrpoSettings, train_pvm_grpo
from keepsight.train.pvm.sft import SftSettings, TrainReport, train_pvm
from keepsight.train.run import four_bit
from keepsight.train.run.controls import Control
from keepsight.train.run.engines import Engine
from keepsight.train.run.flops import ModelShape
from keepsight.train.run.learner import Learner
from keepsight.train.run.plan import plan_memory
from keepsight.train.vismem.dry_run import dry_run_vismem
from keepsight.train.vismem.train import (
    FormationSettings,
    InvocationSettings,
    train_vismem_formation,
    train_vismem_invocation,
)
from keepsight.vismem import VisMemConfig

WEIGHTS = "adapter_model.safetensors"
BASE: dict[str, Any] = {"load_in_4bit": True, "device": device}
SFT: dict[str, Any] = BASE | {"batch_size": 2, "grad_accum": 1, "lr": 1e-3, "save_steps": 1}
GRPO: dict[str, Any] = BASE | {"max_steps": 1, "batch_size": 4, "grad_accum": 1, "group_size": 2, "max_new_tokens": 3}
RL: dict[str, Any] = BASE | {
    "max_steps": 1,
    "batch_size": 2,
    "group_size": 2,
    "max_new_tokens": 4,
    "rows_per_forward": 2,
    "lr": 1e-3,
}
MEMORY = VisMemConfig(num_queries=2, num_short=2, num_long=3, query_width=16, query_heads=2)


@pytest.fixture
def packing() -> Any:
    """Skips where bitsandbytes is not installed."""
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return make_data(tmp_path / "few", 4)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    source = make_data(tmp_path / "questions", 4)
    return write_rows(source, [{"image": f"{i}.png", "prompt": "describe", "answer": str(i)} for i in range(4)])


class Start(TrainerCallback):
    """What a run starts with: dtypes and values of what is trained, which layers are packed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trained = {n: p.detach().to("cpu", copy=True) for n, p in model.named_parameters() if p.requires_grad}
        backbone = Backbone.of(model)
        self.packed = {n for n, m in backbone.model.named_modules() if type(m).__name__ == "Linear4bit"}
        self.linear = {n for n, m in backbone.decoder.named_modules() if isinstance(m, torch.nn.Linear)}
        self.decoder_path = backbone.decoder_path


def brevity(completions: list[Any], **columns: Any) -> list[float]:
    return [len(str(one)) % 5 / 5 for one in completions]


def test_a_memory_learns_beside_a_packed_base(packing: Any, tiny_vlm: Path, few: Path, tmp_path: Path) -> None:
    start, out = Start(), tmp_path / "out"
    settings = SftSettings(**SFT, max_steps=2)
    report = train_pvm(tiny_vlm, few, out, settings=settings, eval_dataset=few, callbacks=[start])
    assert report.base_unchanged is True  # evaluated at every step: bitsandbytes has rearranged nothing
    assert report.frozen == plan_memory(tiny_vlm).base_parameters  # weights are counted, not bytes
    assert {p.dtype for p in start.trained.values()} == {torch.float32}
    assert start.packed == {f"{start.decoder_path}.{n}" for n in start.linear if "visual_memory" not in n}
    loaded, _ = keepsight.load(out, device="cpu")  # on the base as it is stored
    stored = load_file(out / WEIGHTS)
    named = dict(loaded.named_parameters())
    assert all(torch.equal(named[n.replace("pvm_blocks.", "pvm_blocks.default.")], t) for n, t in stored.items())
    assert "four bits" in (out / "README.md").read_text()

    # Broken off at the first checkpoint and resumed: the same weights, bit for bit.
    (out / WEIGHTS).unlink()
    shutil.rmtree(out / "checkpoint-2")
    again = train_pvm(tiny_vlm, few, out, settings=settings, eval_dataset=few, resume=True)
    assert (again.resumed_from, again.base_unchanged) == (1, True)
    resumed = load_file(out / WEIGHTS)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in stored.items())


def test_operations_are_those_of_the_plain_base(packing: Any, tiny_vlm: Path) -> None:
    packed, _ = four_bit.load_base(tiny_vlm, tiny_vlm, SftSettings(**SFT), "auto", device)
    plain, _ = keepsight.load(tiny_vlm, device=device)
    assert ModelShape.of(packed.requires_grad_(False)) == ModelShape.of(plain.requires_grad_(False))


def test_controls_are_trained_on_the_same_packed_base(packing: Any, tiny_vlm: Path, few: Path, tmp_path: Path) -> None:
    controls, settings = [Control("lora"), Control("none")], SftSettings(**SFT, max_steps=1)
    report = train_pvm(tiny_vlm, few, tmp_path / "out", settings=settings, eval_dataset=few, controls=controls)
    assert [one.name for one in report.comparison.outcomes] == ["pvm", "lora", "none"]
    assert all(one.metrics["eval_loss"] > 0 for one in report.comparison.outcomes)
    keepsight.load(tmp_path / "out" / "control-lora")


def test_a_second_stage_starts_from_the_very_values_of_the_first(
    packing: Any, trained: tuple[Path, TrainReport], questions: Path, tmp_path: Path
) -> None:
    start, out = Start(), tmp_path / "out"
    settings = GrpoSettings(**GRPO, rewards=("format",))
    report = train_pvm_grpo(trained[0], questions, out, policy="lora", settings=settings, callbacks=[start])
    assert report.base_unchanged is True
    first = load_file(trained[0] / WEIGHTS)
    memory = {n.partition("base_model.")[2]: t for n, t in start.trained.items() if ".pvm_blocks." in n}
    assert len(memory) == len(first)
    for name, tensor in memory.items():
        assert torch.equal(tensor, first[f"base_model.{name}".replace(".default.", ".")]), name
    assert {t.dtype for t in start.trained.values()} == {torch.float32}
    assert any(".lora_" in name for name in start.trained)
    keepsight.load(out)


def test_vismem_is_formed_and_invoked_on_a_packed_base(
    packing: Any, tiny_vlm: Path, questions: Path, tmp_path: Path
) -> None:
    settings = FormationSettings(**RL, anywhere_probability=0.5, delimiter_share=0.0, warm_start_steps=1)
    first = train_vismem_formation(
        tiny_vlm, questions, tmp_path / "one", vismem=MEMORY, rewards=[brevity], settings=settings
    )
    assert first.changed > 0
    second = InvocationSettings(**RL, train="lora", lora_rank=2, start_bias=4.0)
    report = train_vismem_invocation(tmp_path / "one", questions, tmp_path / "two", rewards=[brevity], settings=second)
    assert report.untouched > 0
    keepsight.load(tmp_path / "two")


def test_estimates_count_what_packing_saves(packing: Any, tiny_vlm: Path) -> None:
    layer = packing.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compress_statistics=True).to(device)
    state = layer.weight.quant_state
    held = layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == four_bit.BYTES_PER_WEIGHT * 256 * 512


def test_a_dry_run_needs_less_in_four_bits(tiny_vlm: Path) -> None:
    def needs(**more: Any) -> list[int]:
        memory = Learner(memory=keepsight.PvmConfig())
        pvm = dry_run(tiny_vlm, memory, SftSettings(device="cpu", **more), length=64)
        return [pvm.need.weights, dry_run_vismem(tiny_vlm, FormationSettings(**more), MEMORY, length=64).need.weights]

    backbone = plan_memory(tiny_vlm).backbone
    linear = [m for m in backbone.decoder.modules() if isinstance(m, torch.nn.Linear)]
    saved = round(sum(m.weight.numel() for m in linear) * (4 - four_bit.BYTES_PER_WEIGHT))
    for plain, packed in zip(needs(), needs(load_in_4bit=True), strict=True):
        assert plain - packed == pytest.approx(saved, abs=1)


@pytest.mark.parametrize(
    ("engine", "policy", "controls", "lesson"),
    [
        (Engine(), "full", (), "--policy full: packed weights cannot learn.*--policy lora"),
        (Engine(), "none", ("lora", "sft"), "--control sft.*Leave sft out"),
        (Engine("fsdp2", 2), "none", (), "fsdp2: packed weights cannot be spread.*ddp.yaml"),
    ],
)
def test_what_cannot_be_in_four_bits_is_refused(
    engine: Engine, policy: Any, controls: Any, lesson: str, tiny_vlm: Path
) -> None:
    with pytest.raises(KeepsightError, match=lesson):
        four_bit.check_four_bit(tiny_vlm, True, engine, policy, controls)
    four_bit.check_four_bit(tiny_vlm, False, engine, policy, controls)


def test_every_stage_refuses_before_it_reads_data(tiny_vlm: Path, tmp_path: Path) -> None:
    nowhere, sft = tmp_path / "no.jsonl", [Control("sft")]
    with pytest.raises(KeepsightError, match="--control sft"):
        train_pvm(tiny_vlm, nowhere, tmp_path / "a", settings=SftSettings(**SFT), controls=sft)
    with pytest.raises(KeepsightError, match="--policy full"), pytest.warns(KeepsightWarning, match="no memory yet"):
        train_pvm_grpo(tiny_vlm, nowhere, tmp_path / "b", settings=GrpoSettings(**GRPO))
    with pytest.raises(KeepsightError, match="--control sft"):
        train_vismem_formation(tiny_vlm, nowhere, tmp_path / "c", settings=FormationSettings(**RL), controls=sft)


def test_a_missing_package_is_named(tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=re.escape(install_line("4bit"))):
        train_pvm(tiny_vlm, tmp_path / "no.jsonl", tmp_path / "out", settings=SftSettings(**SFT))


def test_a_base_that_is_stored_packed_is_read_as_it_is(packing: Any, tiny_vlm: Path, few: Path, tmp_path: Path) -> None:
    model, processor = keepsight.load(
        tiny_vlm, device=device, quantization_config=four_bit.four_bit(tiny_vlm, torch.float32)
    )
    for part in (model, processor):
        part.save_pretrained(tmp_path / "packed")
    start, settings = Start(), SftSettings(**SFT, max_steps=1)
    with pytest.warns(KeepsightWarning, match="--load-in-4bit has no effect"):
        report = train_pvm(tmp_path / "packed", few, tmp_path / "out", settings=settings, callbacks=[start])
    assert report.base_unchanged is True
    assert start.packed
    with pytest.raises(KeepsightError, match="stored quantised, with --policy full"):
        four_bit.check_four_bit(tmp_path / "packed", False, Engine(), "full")
