"""Both stages of VisMem's training: what they change, what they survive, and that several processes are one."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import draw_digit, read_rows, write_rows

import keepsight
from keepsight.data.errors import DataError
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.rewards.rewards import RewardError
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import Control
from keepsight.train.run.output import OutputError, last_checkpoint
from keepsight.train.run.trainer import TrainingDivergedError
from keepsight.train.vismem.train import (
    FormationSettings,
    InvocationSettings,
    VisMemReport,
    train_vismem_formation,
    train_vismem_invocation,
)
from keepsight.vismem import VisMemBranch, VisMemConfig

WEIGHTS = "adapter_model.safetensors"
SIZES: dict[str, Any] = {
    "num_queries": 2,
    "num_short": 2,
    "num_long": 3,
    "query_width": 16,
    "query_heads": 2,
    "short_rank": 2,
    "long_rank": 2,
}
QUICK: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 2,
    "group_size": 3,
    "lr": 3e-3,
    "max_new_tokens": 6,
    "max_invocations": 2,
    "save_steps": 2,
}
OFTEN: dict[str, Any] = {"delimiter_probability": 1.0, "anywhere_probability": 0.3}


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Share of the words that are digits: something that even an untrained model does now and then."""
    return [sum(word.isdigit() for word in text.split()) / max(1, len(text.split())) for text in completions]


def formation(**changes: Any) -> FormationSettings:
    return FormationSettings(**(QUICK | OFTEN | {"device": "cpu"} | changes))


def invocation(**changes: Any) -> InvocationSettings:
    return InvocationSettings(**(QUICK | {"device": "cpu", "start_bias": 3.0} | changes))


def make_questions(folder: Path, count: int = 7, without: int = 1) -> Path:
    """Questions about digits; the last ones have no image."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        draw_digit(index).save(folder / f"{index}.png")
        image = {} if index >= count - without else {"image": f"{index}.png"}
        rows.append({"prompt": "describe", "answer": str(index), "subject": f"digit {index}", **image})
    return write_rows(folder / "questions.jsonl", rows)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_questions(tmp_path_factory.mktemp("questions") / "data")


@pytest.fixture(scope="module")
def formed(tiny_vlm: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisMemReport]:
    """A stage-I adapter; not to be changed."""
    out = tmp_path_factory.mktemp("formed") / "one"
    report = train_vismem_formation(
        tiny_vlm,
        questions,
        out,
        vismem=VisMemConfig(**SIZES),
        rewards=[digits],
        settings=formation(warm_start_steps=2),
        text_only="keep",
    )
    return out, report


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(a: Path, b: Path) -> bool:
    first, second = tensors_of(a), tensors_of(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_stage_one_changes_the_memory_and_nothing_else(formed: tuple[Path, VisMemReport], tiny_vlm: Path) -> None:
    out, report = formed
    assert report.steps == 4
    assert report.changed > 0
    assert report.reference == "the policy without memory"
    model, _ = keepsight.load(out)
    memory = VisMemBranch.of(model).active
    assert not memory.short_bank.is_untrained
    assert not memory.long_bank.is_untrained
    assert memory.rows.is_untrained  # stage II's business
    bare, _ = keepsight.load(tiny_vlm)
    kept = model.get_base_model().state_dict()
    assert all(torch.equal(kept[name], value) for name, value in bare.state_dict().items())
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_vlm)
    assert "ours, not in the paper" in (out / "README.md").read_text()
    assert report.warm_start.steps == 2


@pytest.mark.parametrize("train", ["tokens", "lora"])
def test_stage_two_changes_the_policys_part_and_nothing_else(
    train: Any, formed: tuple[Path, VisMemReport], questions: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    out = tmp_path / "two"
    report = train_vismem_invocation(
        formed[0],
        questions,
        out,
        rewards=[digits],
        settings=invocation(train=train),
        text_only="keep",
        say=said.append,
    )
    before, after = tensors_of(formed[0]), tensors_of(out)
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different
    assert all(".rows." in name and not name.endswith("rows.start") for name in different)
    assert any("no bit of any of the other" in line for line in said)
    assert {"p_type", "p_neg", "dS", "kl"} <= report.last.keys()
    assert report.last["invocations/short"] + report.last["invocations/long"] > 0
    if train == "lora":
        assert any(not torch.equal(v, torch.zeros_like(v)) for n, v in tensors_of(out / "policy").items() if "_B" in n)
        model, processor = keepsight.load(out)
    else:
        model, processor = keepsight.load(out)
    inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|> describe :"], images=[[draw_digit(3)]])
    model.generate(**{name: torch.as_tensor(value) for name, value in inputs.items()}, max_new_tokens=12)


def never(completions: list[str], **columns: Any) -> list[float]:
    """Nothing is ever right."""
    return [0.0] * len(completions)


def test_a_run_that_can_have_learned_nothing_says_so(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    def train(name: str, controls: Any = (), **options: Any) -> None:
        train_vismem_formation(
            tiny_vlm,
            questions,
            tmp_path / name,
            vismem=VisMemConfig(**SIZES),
            rewards=[never],
            settings=formation(max_steps=2, **options),
            text_only="keep",
            controls=controls,
        )

    with pytest.warns(KeepsightWarning, match="in no step did the rewards of a question's trajectories differ"):
        train("unrewarded")
    with pytest.warns(KeepsightWarning) as told:
        train("uninvoked", delimiter_share=0.0, anywhere_probability=1e-9, controls=[Control("lora")])
    warned = [str(one.message) for one in told if str(tmp_path) in str(one.message)]
    assert ["no memory was invoked in any step" in one for one in warned] == [True, False]


def test_a_warm_start_says_how_far_it_is(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings = formation(
        max_steps=1, warm_start_steps=5, logging_steps=2, delimiter_share=0.0, anywhere_probability=1.0
    )
    config = VisMemConfig(**SIZES)
    train_vismem_formation(
        tiny_vlm,
        questions,
        tmp_path / "out",
        vismem=config,
        rewards=[digits],
        settings=settings,
        text_only="skip",
        say=said.append,
    )
    assert [line.split(":")[0] for line in said if re.match(r"warm start \d", line)] == [
        "warm start 2/5",
        "warm start 4/5",
    ]


def test_everything_is_logged(formed: tuple[Path, VisMemReport]) -> None:
    out, report = formed
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {"loss", "reward", "reward/digits", "group_std", "dS", "kl", "lr", "tokens_per_second", "gradient_norm"}
    wanted |= {"invocations/short", "invocations/long", "gradient_norm/query_builder", "gradient_norm/long_former"}
    assert all(wanted <= line.keys() for line in lines)
    # A fifth of the steps rises, the first of them not from 0; then a cosine down to 0 behind the last.
    assert [line["lr"] / QUICK["lr"] for line in lines] == pytest.approx([1, 1, 0.75, 0.25])
    assert lines[-1]["tokens_generated"] == report.tokens_generated > 0
    assert lines[-1]["tokens_trained"] == report.tokens_trained > 0
    cost = RunCost.read(out)
    assert cost.tokens_generated == report.tokens_generated
    assert cost.tokens_trained == report.tokens_trained
    assert cost.flops > 0
    assert cost.steps == 4


def run_stage(stage: str, source: Path, data: Path, out: Path, max_steps: int = 4, **more: Any) -> VisMemReport:
    options = {"max_steps": max_steps, "save_steps": 1}
    common: dict[str, Any] = {"rewards": ["test_vismem_train:digits"], "text_only": "keep", **more}
    if stage == "formation":
        config = VisMemConfig(**SIZES)
        return train_vismem_formation(source, data, out, vismem=config, settings=formation(**options), **common)
    return train_vismem_invocation(source, data, out, settings=invocation(**options), **common)


@pytest.mark.parametrize("stage", ["formation", "invocation"])
def test_a_killed_run_resumes_to_the_same_weights(
    stage: str, formed: tuple[Path, VisMemReport], tiny_vlm: Path, questions: Path, tmp_path: Path
) -> None:
    train = partial(run_stage, stage, tiny_vlm if stage == "formation" else formed[0])
    unbroken = train(questions, tmp_path / "unbroken")
    out = tmp_path / "killed"
    # spawned, not forked: torch's threads do not outlive a fork
    run = multiprocessing.get_context("spawn").Process(target=train, args=(questions, out))
    run.start()
    deadline = time.monotonic() + 120
    while last_checkpoint(out)[0] is None and time.monotonic() < deadline and run.is_alive():
        time.sleep(0.002)
    os.kill(run.pid or 0, signal.SIGKILL)
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()

    said: list[str] = []
    report = train(questions, out, resume=True, say=said.append)
    assert report.resumed_from is not None
    assert report.resumed_from >= 1
    assert same(tmp_path / "unbroken", out)
    assert (report.tokens_generated, report.last["reward"]) == (unbroken.tokens_generated, unbroken.last["reward"])
    first, second = (
        [json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "unbroken", out)
    )
    assert first == second
    # Under other settings it is another run.
    with pytest.raises(OutputError, match="max_steps was 4, now 9"):
        train(questions, out, max_steps=9, resume=True)
    others = write_rows(
        questions.parent / f"{stage}.jsonl", [{**row, "answer": "never"} for row in read_rows(questions)]
    )
    with pytest.raises(OutputError, match="digest of the data"):
        train(others, out, resume=True)


def test_a_checkpoint_of_before_the_one_engine_is_read(formed: tuple[Path, VisMemReport], tmp_path: Path) -> None:
    """Its logs stood in the run's folder alone."""
    from keepsight.train.vismem.accounts import METRICS, STATE, VisMemState

    now = VisMemState.read(formed[0] / "checkpoint-2")
    names = ("kl_coefficient", "tokens_generated", "tokens_trained")
    old = {"step": now.global_step, "seconds": 1.0, "first": {}, "last": {}} | {n: getattr(now, n) for n in names}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / STATE).write_text(json.dumps({"global_step": now.global_step, "progress": old}))
    (tmp_path / METRICS).write_text((formed[0] / METRICS).read_text() + '{"step": 5, "lo')
    read = VisMemState.read(tmp_path / "checkpoint-2")
    assert len(read.log_history) == read.global_step == 2
    assert all(getattr(read, name) == getattr(now, name) for name in ("log_history", *names))


def test_data_that_cannot_be_rewarded_are_refused_before_weights_are_read(
    tiny_vlm: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keepsight.train.vismem import loading

    monkeypatch.setattr(loading, "load_base", lambda *args, **kwargs: pytest.fail("the weights were read"))
    with pytest.raises(DataError, match="no image"):
        train_vismem_formation(tiny_vlm, questions, tmp_path / "a", rewards=[digits], settings=formation())
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    silent = write_rows(questions.parent / "silent.jsonl", [{**row, "answer": ""} for row in rows])
    with pytest.raises(DataError, match="answer"):
        train_vismem_formation(tiny_vlm, silent, tmp_path / "b", settings=formation(), text_only="keep")
    with pytest.raises(RewardError, match="nowhere"):
        train_vismem_formation(tiny_vlm, questions, tmp_path / "c", rewards=["nowhere:at_all"], settings=formation())
    with pytest.raises(ValueError, match=r"query_width=50 is not a multiple"):
        train_vismem_formation(tiny_vlm, questions, tmp_path / "d", vismem=VisMemConfig(query_width=50))
    with pytest.raises(OutputError, match="cannot be written"):
        train_vismem_formation(tiny_vlm, questions, "/proc/keepsight", rewards=[digits], settings=formation())
    with pytest.raises(KeepsightError, match="is no adapter"):
        train_vismem_invocation(tiny_vlm, questions, tmp_path / "e", rewards=[digits], settings=invocation())
    with pytest.raises(ValueError, match="report_to='banana' is no tracker"):
        train_vismem_formation(tiny_vlm, questions, tmp_path / "f", settings=formation(report_to=("banana",)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("reward", "lesson"),
    [
        (lambda completions, **c: [float("nan")] * len(completions), "finite number"),
        (lambda completions, **c: [0.0], "returned 1 numbers for 6 completions"),
    ],
)
def test_a_bad_reward_is_named(reward: Any, lesson: str, tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    reward.__name__ = "dubious"
    with pytest.raises(RewardError, match=rf"'dubious'.*{lesson}"):
        train_vismem_formation(
            tiny_vlm,
            questions,
            tmp_path / "out",
            vismem=VisMemConfig(**SIZES),
            rewards=[reward],
            settings=formation(),
            text_only="keep",
        )


def test_rewards_see_the_samples_columns(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, str, str]] = []

    def spy(prompts: Any, completions: list[str], answer: list[str], subject: list[str]) -> list[float]:
        for prompt, text, right, about in zip(prompts, completions, answer, subject, strict=True):
            assert prompt[-1]["role"] == "user"
            seen.append((text, right, about))
        return [float(len(text)) for text in completions]

    train_vismem_formation(
        tiny_vlm,
        questions,
        tmp_path / "out",
        vismem=VisMemConfig(**SIZES),
        rewards=[spy],
        settings=formation(max_steps=1, delimiter_share=0.0),
        text_only="keep",
    )
    assert len(seen) >= 6
    assert all(about == f"digit {right}" for _, right, about in seen)
    assert not any("memory|>" in text for text, _, _ in seen)


def test_prompts_where_nothing_was_invoked_teach_nothing(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    """No memory, no gradient: the weights stay, nothing breaks, and it is told."""
    with pytest.warns(KeepsightWarning, match="no memory was invoked in any step"):
        report = train_vismem_formation(
            tiny_vlm,
            questions,
            tmp_path / "out",
            vismem=VisMemConfig(**SIZES),
            rewards=[digits],
            settings=formation(delimiter_probability=1e-9, anywhere_probability=1e-9, max_steps=2),
            text_only="keep",
        )
    assert report.last["gradient_norm"] == 0
    assert report.changed == 0


def test_micro_batches_change_nothing(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    """However many rows a rollout or a forward holds, with checkpointing or without."""
    runs = {
        "together": {"rows_per_rollout": 99, "rows_per_forward": 99},
        "apart": {"rows_per_rollout": 2, "rows_per_forward": 1, "gradient_checkpointing": True},
    }
    for name, options in runs.items():
        train_vismem_formation(
            tiny_vlm,
            questions,
            tmp_path / name,
            vismem=VisMemConfig(**SIZES),
            rewards=[digits],
            settings=formation(max_steps=2, **options),
            text_only="keep",
        )
    a, b = tensors_of(tmp_path / "together"), tensors_of(tmp_path / "apart")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=3e-4, msg=name)


def test_a_diverging_run_stops_and_keeps_what_was_good(
    tiny_vlm: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keepsight.train.vismem.stages import FormationStage

    original, calls = FormationStage.log_probs, [0]

    def poisoned(self: Any, *args: Any) -> torch.Tensor:
        calls[0] += 1
        return original(self, *args) * (float("nan") if calls[0] > 4 else 1.0)

    monkeypatch.setattr(FormationStage, "log_probs", poisoned)
    out = tmp_path / "out"
    with pytest.raises(TrainingDivergedError, match="in step"):
        train_vismem_formation(
            tiny_vlm,
            questions,
            out,
            vismem=VisMemConfig(**SIZES),
            rewards=[digits],
            settings=formation(max_steps=30, save_steps=1, rows_per_forward=9),
            text_only="keep",
        )
    assert last_checkpoint(out)[0] is not None
    assert not (out / WEIGHTS).exists()


def test_stage_two_of_an_untrained_memory_warns(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    with pytest.warns(KeepsightWarning, match="no memory was invoked"):
        train_vismem_formation(
            tiny_vlm,
            questions,
            one,
            vismem=VisMemConfig(**SIZES),
            rewards=[digits],
            settings=formation(max_steps=1, delimiter_probability=1e-9, anywhere_probability=1e-9),
            text_only="keep",
        )
    with pytest.warns(KeepsightWarning, match="learn when to invoke noise"):
        train_vismem_invocation(
            one, questions, tmp_path / "two", rewards=[digits], settings=invocation(max_steps=1), text_only="keep"
        )


@pytest.mark.parametrize(
    ("wrong", "lesson"),
    [
        ({"group_size": 1}, "at least 2"),
        ({"lr": 0.0}, "above 0"),
        ({"kl": -1.0}, "at least 0"),
        ({"scheduler": "banana"}, "cosine, linear, constant"),
        ({"delimiter_probability": 0.0, "anywhere_probability": 0.0}, "no memory would ever be formed"),
        ({"delimiter_share": 1.5}, "from 0 to 1"),
    ],
)
def test_impossible_settings(wrong: dict[str, Any], lesson: str) -> None:
    with pytest.raises(ValueError, match=lesson):
        FormationSettings(**wrong)


def test_defaults_are_the_papers() -> None:
    for settings in (FormationSettings(), InvocationSettings()):
        assert (settings.batch_size, settings.epochs, settings.group_size, settings.iterations) == (8, 2, 16, 1)
        assert (settings.lr, settings.scheduler, settings.warmup_ratio) == (5e-5, "cosine", 0.2)
        assert (settings.clip, settings.kl, settings.target_kl) == (0.2, 0.015, 0.03)
    assert FormationSettings().warm_start_steps == 0
    assert InvocationSettings().invocation_cost == 0


def run_command(*words: str) -> Any:
    from typer.testing import CliRunner

    from keepsight.cli import app

    return CliRunner().invoke(app, ["train", *words])


def test_the_commands_train_both_stages_beside_controls(
    tiny_vlm: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_stages.py").write_text(
        "def digits(completions, answer, **columns):\n"
        "    return [sum(w.isdigit() for w in text.split()) / 9 for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = ["--data", str(questions), "--text-only", "keep", "--reward", "rewards_of_stages:digits", "--device", "cpu"]
    flags += ["--max-steps", "1", "--batch-size", "2", "--group-size", "2", "--max-new-tokens", "4", "--lr", "1e-3"]
    flags += ["--max-invocations", "2", "--eval-dataset", str(questions)]
    sizes = ["--num-short", "2", "--num-long", "3", "--num-queries", "2", "--delimiter-probability", "1"]
    one = run_command("vismem-formation", str(tiny_vlm), "-o", "one", *flags, *sizes, "--control", "lora,sft=1e-4,none")
    assert one.exit_code == 0, one.output
    assert "no bit changed" in one.stdout
    told = json.loads((tmp_path / "one" / "comparison.json").read_text())["outcomes"]
    assert [outcome["name"] for outcome in told] == ["vismem", "lora", "sft", "none"]
    memory, lora, sft, none = told
    model, _ = keepsight.load(tmp_path / "one")
    size = sum(p.numel() for p in VisMemBranch.of(model).active.parameters())
    assert 0.9 * size < lora["parameters"] <= size
    assert sft["parameters"] > size
    assert sft["lr"] == 1e-4
    assert {outcome["steps"] for outcome in told[:3]} == {1}
    assert all("eval_reward" in outcome["metrics"] for outcome in told)
    assert none["metrics"]["eval_reward"] == memory["metrics"]["eval_reward_without_memory"]
    # The control is an ordinary adapter of the base, without a memory.
    beside, _ = keepsight.load(tmp_path / "one" / "control-lora")
    assert "LORA" in str(beside.peft_config["default"].peft_type)
    keepsight.load(tmp_path / "one" / "control-sft")

    # Stage II's controls go on from stage I's, here from a LoRA that no other run has; the base stays the base.
    before = load_file(tmp_path / "one" / "control-lora" / WEIGHTS)
    save_file(
        {n: t + 0.5 if ".lora_B." in n else t for n, t in before.items()}, tmp_path / "one/control-lora" / WEIGHTS
    )
    beside_two = ["--train", "lora", "--control", "lora,sft,none"]
    two = run_command("vismem-invocation", "one", "-o", "two", *flags, "--start-bias", "2", *beside_two)
    assert two.exit_code == 0, two.output
    assert "p_type" in two.stderr
    after = load_file(tmp_path / "two" / "control-lora" / WEIGHTS)
    assert after.keys() == before.keys()
    assert all((after[n] - t - 0.5).abs().max() < 0.01 for n, t in before.items() if ".lora_B." in n)
    assert any(not torch.equal(after[n], t + 0.5) for n, t in before.items() if ".lora_B." in n)
    assert "control sft in two/control-sft, from one/control-sft" in two.stderr
    told = {one["name"]: one for one in json.loads((tmp_path / "two" / "comparison.json").read_text())["outcomes"]}
    assert told["none"]["metrics"]["eval_reward"] == none["metrics"]["eval_reward"]
    assert told["lora"]["parameters"] == lora["parameters"]
    again = run_command("vismem-invocation", "one", "-o", "two", *flags, "--start-bias", "2")
    assert again.exit_code != 0
    assert "not empty" in str(again.output) + str(again.exception)


def test_a_control_that_vismem_has_not_is_refused(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(KeepsightError, match="Take lora"):
        train_vismem_formation(
            tiny_vlm, questions, tmp_path / "out", rewards=[digits], settings=formation(), controls=[Control("mlp")]
        )


def test_a_dry_run_reads_no_weights(tiny_vlm: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keepsight.train.vismem.dry_run import dry_run_vismem

    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: pytest.fail("weights were read"))
    small = dry_run_vismem(tiny_vlm, formation(), VisMemConfig(**SIZES), length=64)
    large = dry_run_vismem(tiny_vlm, formation(rows_per_forward=8), VisMemConfig(**SIZES), length=64)
    assert large.need.activations_plain > 1.5 * small.need.activations_plain
    assert small.need.activations_checkpointed < small.need.activations_plain
    assert small.traced.flops > 0
    tokens = dry_run_vismem(tiny_vlm, invocation(), VisMemConfig(**SIZES), length=64)
    assert tokens.trained == 4 * 96 + 2  # tied head: four rows and two biases
    result = run_command("vismem-formation", str(tiny_vlm), "--dry-run", "--data", str(questions))
    assert result.exit_code == 0, result.output
    assert "16 of them visual" in result.stdout


def test_a_dry_run_of_an_adapter_measures_the_data(formed: tuple[Path, VisMemReport], questions: Path) -> None:
    result = run_command("vismem-invocation", str(formed[0]), "--dry-run", "--data", str(questions))
    assert result.exit_code == 0, result.output
    assert "16 of them visual" in result.stdout


def test_a_dry_runs_count_is_the_runs(formed: tuple[Path, VisMemReport], tiny_vlm: Path) -> None:
    from keepsight.train.vismem.dry_run import dry_run_vismem

    assert dry_run_vismem(tiny_vlm, formation(), VisMemConfig(**SIZES)).trained == formed[1].trainable


def test_a_stage_says_all_that_the_trainer_asks() -> None:
    from keepsight.train.vismem.stages import Stage

    class Half(Stage):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half(None, None)
