"""Training end to end on a tiny VLM: only the memory learns, runs resume exactly, and nothing saved is ever lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, TinyFamily
from family_processors import family_folder
from safetensors.torch import load_file
from tiny_training import FLAGS, QUICK, draw_digit, read_rows, write_rows

import keepsight
from keepsight.errors import KeepsightError
from keepsight.train.pvm import job
from keepsight.train.pvm.blindfold import BlindfoldError, BlindfoldSchedule
from keepsight.train.pvm.sft import SftSettings, TrainReport, train_pvm

WEIGHTS = "adapter_model.safetensors"


def settings(**changes: Any) -> SftSettings:
    return SftSettings(**(QUICK | changes))


def answer_loss(model: Any, processor: Any, data: Path) -> float:
    from keepsight.data.check import check_dataset, load_dataset_any, read_sample
    from keepsight.data.collate import ConversationCollator

    checked = check_dataset(load_dataset_any(data))
    batch = ConversationCollator(processor)([read_sample(row, checked.source) for row in checked.dataset])
    with torch.no_grad():
        return float(model(**batch).loss)


def test_the_loss_falls_and_only_the_memory_learns(
    trained: tuple[Path, TrainReport], tiny_vlm: Path, data: Path
) -> None:
    adapter, report = trained
    assert report.first_loss is not None
    assert report.last_loss is not None
    assert report.last_loss < report.first_loss - 0.3
    assert report.base_unchanged is True
    assert all(gate != 0 for gate in report.gates.values())
    assert all("pvm_" in name for name in load_file(adapter / WEIGHTS))
    assert sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values()) == report.trainable

    base, processor = keepsight.load(tiny_vlm)
    model, _ = keepsight.load(adapter)
    assert answer_loss(model, processor, data) < answer_loss(base, processor, data) - 0.3
    on_disk = load_file(tiny_vlm / "model.safetensors")
    for name, tensor in model.get_base_model().state_dict().items():
        if "pvm_" not in name and name in on_disk:
            assert torch.equal(tensor, on_disk[name].to(tensor.dtype)), name


def test_every_family_trains(family: TinyFamily, data: Path, tmp_path: Path) -> None:
    base = family_folder(family, tmp_path / "base")
    pvm = keepsight.PvmConfig(layers=[1, 3], width=32)
    said: list[str] = []
    report = train_pvm(base, data, tmp_path / "out", pvm=pvm, settings=settings(max_steps=8, lr=1e-2), say=said.append)
    told = next(line for line in said if "steps; blindfolded: " in line)
    assert ("blindfolded: none" if family.hybrid else "blindfolded: the first 3 steps, then 50%") in told
    assert family.hybrid == any(line.startswith("no blindfold warm-up") and "linear attention" in line for line in said)
    assert report.base_unchanged is True
    assert report.last_loss < report.first_loss
    assert all(abs(gate) > 0.01 for gate in report.gates.values())
    model, processor = keepsight.load(tmp_path / "out")
    loss_on = answer_loss(model, processor, data)
    with model.disable_adapter():
        assert answer_loss(model, processor, data) > loss_on


def test_the_adapter_names_its_base_as_the_user_did_and_generates(
    trained: tuple[Path, TrainReport], tiny_vlm: Path
) -> None:
    adapter, _ = trained
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_vlm)
    assert not (adapter / "training_args.bin").exists()
    model, processor = keepsight.load(adapter)
    inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|> describe :"], images=[[draw_digit(3)]])
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with model.disable_adapter():
        without = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(tokens, without)


def test_gates_learn_at_their_own_rate(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    # One step with a constant rate: Adam's first step moves every parameter by exactly its learning rate.
    report = train_pvm(
        tiny_vlm,
        data,
        tmp_path / "out",
        settings=settings(max_steps=1, lr=1e-3, gate_lr_multiplier=20, warmup_ratio=0, scheduler="constant"),
    )
    for gate in report.gates.values():
        assert abs(gate) == pytest.approx(0.02, rel=1e-2)


def test_logs_hold_gates_loss_rate_and_tokens(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    logs: list[dict[str, float]] = []
    train_pvm(
        tiny_vlm,
        data,
        tmp_path / "out",
        pvm=keepsight.PvmConfig(layers=[1, 3], width=32),
        eval_dataset=data,
        settings=settings(max_steps=5, logging_steps=2, eval_steps=2),
        on_log=lambda values, step, total: logs.append(values),
    )
    training = [values for values in logs if "loss" in values]
    assert len(training) == 4  # the first step, every second, and the last
    assert {"loss", "learning_rate", "num_tokens", "gate/1", "gate/3"} <= training[-1].keys()
    assert {"tokens_per_second", "grad_norm"} <= training[-1].keys()
    # Only the memory is trained, so its gradients are all there are.
    assert training[-1]["memory_grad_norm"] == pytest.approx(training[-1]["grad_norm"], rel=1e-4)
    assert "gate/2" not in training[-1]
    assert len([values for values in logs if "eval_loss" in values]) >= 2


@pytest.mark.parametrize("every", [2, 3])
def test_the_last_step_is_evaluated_once(every: int, tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []
    report = train_pvm(
        tiny_vlm,
        data,
        tmp_path / "out",
        eval_dataset=data,
        settings=settings(max_steps=4, eval_steps=every),
        on_log=lambda values, step, total: seen.append((step, values["eval_loss"])) if "eval_loss" in values else None,
    )
    assert [step for step, _ in seen] == ([2, 4] if every == 2 else [3, 4])
    assert report.metrics["eval_loss"] == seen[-1][1]
    assert all(name.startswith("eval_") for name in report.metrics)


def test_a_blindfold_that_never_comes_off_is_warned_of(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    with pytest.warns(keepsight.errors.KeepsightWarning, match="blindfold_steps=2 covers all 2 steps"):
        train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=2, blindfold_steps=2))


def test_the_look_up_stays_needed_and_can_be_watched(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    """Behind the warm-up every second step is blindfolded; the log tells both kinds of steps apart."""
    logs: dict[int, dict[str, float]] = {}

    def note(values: dict[str, float], step: int, total: int) -> None:
        if "loss" in values:
            logs[step] = values

    seen = {}
    for steps, share in ((2, None), (2, 0.0), (None, None), (0, None)):
        options = settings(max_steps=6, logging_steps=1, grad_accum=2, blindfold_steps=steps, blindfold_share=share)
        train_pvm(tiny_vlm, data, tmp_path / f"out-{steps}-{share}", settings=options, on_log=note)
        kinds = ("blindfolded_loss", "sighted_loss")
        seen[steps, share] = ["".join(k[0] for k in kinds if k in logs[n]) for n in range(1, 7)]
        for values in logs.values():
            told = values.get("blindfolded_loss", values.get("sighted_loss", values["loss"]))
            assert told == pytest.approx(values["loss"], abs=1e-3)
    assert seen == {
        (2, None): list("bbsbsb"),
        (2, 0.0): list("bbssss"),
        (None, None): list("bbsbsb"),  # three eighths of six steps, and every second one: the laboratory's recipe
        (0, None): [""] * 6,
    }


def test_the_papers_recipe_has_neither_of_our_additions() -> None:
    paper = SftSettings.paper(max_steps=5)
    assert (paper.blindfold_steps, paper.gate_lr_multiplier, paper.max_steps) == (0, 1.0, 5)
    assert not BlindfoldSchedule.of(paper, 1000)
    assert str(BlindfoldSchedule.of(SftSettings(), 1000)).startswith("the first 375 steps, then 50%")


def test_a_blindfold_that_was_asked_for_and_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    base = family_folder(BY_NAME["qwen3_5"], tmp_path / "base")
    for asked in ({"blindfold_steps": 2}, {"blindfold_share": 0.5}):
        with pytest.raises(BlindfoldError, match="linear attention"):
            train_pvm(base, data, tmp_path / "out", settings=settings(**asked))


def test_what_the_rule_means_for_serving_is_said(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    for causal, told in ((True, "vLLM can serve this memory"), (False, "vLLM cannot serve this memory")):
        said: list[str] = []
        pvm = keepsight.PvmConfig(causal=causal)
        train_pvm(tiny_vlm, data, tmp_path / str(causal), pvm=pvm, settings=settings(max_steps=1), say=said.append)
        assert any(told in line for line in said)


def test_a_blindfold_for_all_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="blindfold_share=1: expected a share"):
        settings(blindfold_share=1)


def test_over_long_answers_are_cut_and_images_never(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    rows = read_rows(data)
    rows[0]["messages"][1]["content"] = "a1 3 . " * 200
    write_rows(data, rows)
    with pytest.raises(KeepsightError, match=r"line 1, messages: \d+ tokens after processing"):
        train_pvm(tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=1, max_length=64))
    report = train_pvm(
        tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=4, max_length=64, over_long="truncate")
    )
    assert report.data.longest is not None
    assert report.data.cut == 1
    assert report.steps == 4
    assert report.tokens <= 64 * 16


def test_text_only_samples_that_are_kept_train(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    rows = read_rows(data)
    write_rows(data, [row | {"images": []} if i % 2 else row for i, row in enumerate(rows)])
    report = train_pvm(
        tiny_vlm, data, tmp_path / "out", settings=settings(max_steps=16, batch_size=1, text_only="keep")
    )
    assert report.data.text_only == 8
    assert report.base_unchanged
    assert all(gate != 0 for gate in report.gates.values())


def test_gradient_checkpointing_and_accumulation_change_nothing(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    plain = train_pvm(tiny_vlm, data, tmp_path / "plain", settings=settings(max_steps=4))
    options = {"batch_size": 2, "grad_accum": 2, "gradient_checkpointing": True}
    other = train_pvm(tiny_vlm, data, tmp_path / "other", settings=settings(max_steps=4, **options))
    for layer, gate in plain.gates.items():
        assert other.gates[layer] == pytest.approx(gate, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "lesson"),
    [
        ({"pvm": keepsight.PvmConfig(layers=[9])}, "out of range; the model has layers 0 to 3"),
        ({"pvm": keepsight.PvmConfig(width=50)}, "Try 48 or 64"),
        ({"settings": settings(scheduler="banana")}, "scheduler='banana': expected one of"),
        ({"settings": settings(report_to=("banana",))}, "report_to='banana' is no tracker"),
    ],
)
def test_bad_settings_are_refused_before_weights_are_read(
    options: dict[str, Any], lesson: str, tiny_vlm: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "load_base", lambda *args, **kwargs: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=lesson):
        train_pvm(tiny_vlm, data, tmp_path / "out", **({"settings": settings()} | options))


def test_flags_and_settings_agree() -> None:
    # `FLAGS` and `QUICK` are two spellings of one run, on which the tests of the command line rely.
    values = dict(zip(FLAGS[::2], FLAGS[1::2], strict=True))
    for flag, value in values.items():
        assert float(value) == QUICK[flag[2:].replace("-", "_")]


def test_the_examples_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    examples = Path(__file__).parents[2] / "examples"
    runpy.run_path(str(examples / "train_pvm.py"))["main"](tmp_path, 4)
    adapter, image = tmp_path / "memory", tmp_path / "data" / "0.png"
    recorded = json.loads((adapter / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == "keepsight/reference"
    runpy.run_path(str(examples / "generate.py"))["main"](str(adapter), str(image), "describe")
    printed = capsys.readouterr().out
    assert "base unchanged: True" in printed
    assert "without the memory:" in printed


def test_the_reference_reads_on_the_command_line(tmp_path: Path) -> None:
    import numpy as np
    from typer.testing import CliRunner

    from keepsight.cli import app
    from keepsight.lab.digits import draw_grids

    images, digits = draw_grids(1, "test", np.random.default_rng(0))
    images[0].save(tmp_path / "digits.png")
    result = CliRunner().invoke(
        app, ["generate", "-i", str(tmp_path / "digits.png"), "-p", "read", "--max-new-tokens", "9"]
    )
    assert result.exit_code == 0, result.output
    said = result.stdout.split()
    assert said[::3] == ["a1", "b1", "c1"]
    assert sum(int(word) == digit for word, digit in zip(said[1::3], digits[0], strict=False)) >= 2
