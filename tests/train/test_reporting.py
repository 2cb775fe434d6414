"""What a long run has to show arrives where `--report-to` sends it: read back from the files of TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_data, write_rows

from keepsight.train.pvm.grpo import GrpoSettings, train_pvm_grpo
from keepsight.train.pvm.sft import SftSettings, train_pvm
from keepsight.train.vismem.train import (
    FormationSettings,
    InvocationSettings,
    train_vismem_formation,
    train_vismem_invocation,
)
from keepsight.vismem import VisMemConfig

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

COMMON: dict[str, Any] = {"max_steps": 2, "device": "cpu", "logging_steps": 1, "report_to": ("tensorboard",)}
RL: dict[str, Any] = COMMON | {"batch_size": 2, "group_size": 2, "max_new_tokens": 4, "lr": 1e-3}
MEMORY = VisMemConfig(num_queries=2, num_short=2, num_long=3, query_width=16, query_heads=2)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    source = make_data(tmp_path / "questions", 4)
    return write_rows(source, [{"image": f"{i}.png", "prompt": "describe", "answer": str(i)} for i in range(4)])


def brevity(completions: list[Any], **columns: Any) -> list[float]:
    return [len(str(one)) % 5 / 5 for one in completions]


def reported(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps that have a value, over all event files of a run, without the trackers' prefix."""
    found: dict[str, list[int]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = accumulators.EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag.removeprefix("train/"), []).extend(e.step for e in events.Scalars(tag))
    return found


def test_supervised_training(tiny_vlm: Path, tmp_path: Path) -> None:
    data, out = make_data(tmp_path / "data", 4), tmp_path / "out"
    train_pvm(tiny_vlm, data, out, settings=SftSettings(**COMMON, batch_size=2, grad_accum=1))
    found = reported(out)
    promised = {"loss", "memory_grad_norm", "learning_rate", "num_tokens", "memory_gib", "mean_token_accuracy"}
    assert promised | {f"gate/{layer}" for layer in (1, 2, 3)} <= set(found)
    assert found["loss"] == found["gate/1"] == [1, 2]
    assert found["tokens_per_second"] == [2]  # between one line and the next


def test_reinforcement(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = GrpoSettings(
        **COMMON, batch_size=2, grad_accum=1, group_size=2, max_new_tokens=3, kl=0.1, lr=1e-3, rewards=("format",)
    )
    train_pvm_grpo(tiny_vlm, questions, out, policy="none", settings=settings)
    promised = {"loss", "reward", "kl", "memory_grad_norm", "num_tokens", "memory_gib", "completions/mean_length"}
    assert promised | {"gate/1", "tokens_per_second"} <= set(reported(out))


def test_both_stages_of_vismem(tiny_vlm: Path, questions: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    settings = FormationSettings(**RL, anywhere_probability=0.5, delimiter_share=0.0)
    train_vismem_formation(tiny_vlm, questions, first, vismem=MEMORY, rewards=[brevity], settings=settings)
    both = {"loss", "reward", "dS", "kl", "invocations/short", "invocations/long", "tokens_per_second"}
    norms = {f"gradient_norm/{part}" for part in ("query_builder", "short_former", "long_former", "gains")}
    found = reported(first)
    assert both | norms <= set(found)
    assert found["reward"] == [1, 2]
    settings_of_second = InvocationSettings(**RL, start_bias=4.0)
    train_vismem_invocation(first, questions, second, rewards=[brevity], settings=settings_of_second)
    norms = {f"gradient_norm/{part}" for part in ("invoke_rows", "end_rows")}
    assert both | norms | {"p_type", "p_neg"} <= set(reported(second))
