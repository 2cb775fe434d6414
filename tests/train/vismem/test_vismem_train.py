"""Both stages of VisMem's training: what they change, what they survive, and that several processes are one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import draw_digit, write_rows
from vismem_questions import (
    QUICK,
    SIZES,
    digits,
    formation,
    invocation,
    tensors_of,
)

import keepsight
from keepsight.data.errors import DataError
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.rewards.rewards import RewardError
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import Control
from keepsight.train.run.output import OutputError
from keepsight.train.vismem.train import (
    FormationSettings,
    InvocationSettings,
    VisMemReport,
    train_vismem_formation,
    train_vismem_invocation,
)
from keepsight.vismem import VisMemBranch, VisMemConfig


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


def test_a_warm_start_is_paid_for(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    """Each of its steps is counted: ten more cost as much again."""
    costs = []
    for steps in (1, 11, 21):
        settings = formation(max_steps=1, warm_start_steps=steps, delimiter_share=0.0, anywhere_probability=1.0)
        out = tmp_path / str(steps)
        config = VisMemConfig(**SIZES)
        train_vismem_formation(
            tiny_vlm, questions, out, vismem=config, rewards=[digits], settings=settings, text_only="skip"
        )
        costs.append(RunCost.read(out).flops)
    first, second = costs[1] - costs[0], costs[2] - costs[1]
    assert first == pytest.approx(second, rel=0.3)
    assert first > 0.5 * costs[0]


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


def test_a_stage_says_all_that_the_trainer_asks() -> None:
    from keepsight.train.vismem.stages import Stage

    class Half(Stage):
        name = "half"

    with pytest.raises(TypeError, match="abstract"):
        Half(None, None)
