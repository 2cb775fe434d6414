"""Reinforcement end to end on a tiny VLM: what learns and what stays, rewards that rise, runs that resume exactly."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, TinyFamily
from family_processors import family_folder
from safetensors.torch import load_file
from tiny_training import make_data, read_rows, write_rows

import keepsight
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.pvm.grpo import GrpoSettings, train_pvm_grpo
from keepsight.train.pvm.sft import SftSettings, TrainReport, train_pvm
from keepsight.train.rewards.rewards import RewardError
from keepsight.train.run.accounting import RunCost
from keepsight.train.run.controls import Control
from keepsight.train.run.output import OutputError, last_checkpoint

WEIGHTS = "adapter_model.safetensors"
QUICK: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 4,
    "grad_accum": 2,
    "group_size": 4,
    "max_new_tokens": 4,
    "lr": 1e-3,
    "rewards": ("rl_rewards:length",),
    "mask_truncated": False,
    "logging_steps": 1,
    "save_steps": 2,
}
REWARDS = """
def length(completions, **columns):
    return [len(one[0]["content"].split()) / 4 for one in completions]

def same(completions, **columns):
    return [0.5] * len(completions)

def dots(completions, **columns):
    return [one[0]["content"].split().count(".") / 4 for one in completions]

def ids(completions, completion_ids, **columns):
    return [one[0] % 7 / 7 for one in completion_ids]

def bad(completions, **columns):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rl_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rl_rewards", raising=False)
    return tmp_path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    source = make_data(tmp_path / "prompts", 8)
    rows = [{"image": f"{i}.png", "prompt": "describe", "answer": f"a1 {i} .", "level": i} for i in range(8)]
    return write_rows(source, rows)


def settings(**changes: Any) -> GrpoSettings:
    return GrpoSettings(**(QUICK | changes))


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace("base_model.model.", ""): tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "lesson"),
    [
        ({"rewards": ("rl_rewards:same",)}, "in no step did the rewards of a prompt's completions differ"),
        ({"mask_truncated": True, "max_new_tokens": 1}, "every completion was cut off at 1 tokens"),
    ],
)
def test_a_run_that_can_have_learned_nothing_says_so(
    changes: dict[str, Any], lesson: str, trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path
) -> None:
    with pytest.warns(KeepsightWarning, match=lesson):
        train_pvm_grpo(trained[0], prompts, tmp_path / "out", policy="none", settings=settings(max_steps=1, **changes))


@pytest.mark.parametrize("policy", ["full", "lora", "none"])
def test_only_what_was_chosen_learns_and_the_result_loads(
    policy: Any, trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path
) -> None:
    logs: list[dict[str, float]] = []
    report = train_pvm_grpo(
        trained[0],
        prompts,
        tmp_path / "out",
        policy=policy,
        lora_rank=2,
        settings=settings(),
        on_log=lambda values, step, total: logs.append(values),
    )
    assert report.base_unchanged is True
    wanted = {"reward", "memory_grad_norm", "gate/1", "num_tokens", "grad_norm", "completions/mean_length"}
    assert wanted <= logs[1].keys()
    assert "tokens_per_second" in logs[1]

    before, _ = keepsight.load(trained[0])
    after, processor = keepsight.load(tmp_path / "out")
    assert processor.tokenizer.padding_side == keepsight.load(trained[0])[1].tokenizer.padding_side
    old, new = state(before), state(after)
    memory = [n for n in old if "pvm_blocks" in n]
    found = {n.replace(".out.", ".adapter."): t for n, t in new.items()}
    changed = {n for n in old if n in found and not torch.equal(found[n], old[n])}
    language = {n for n in old if "language_model" in n or "lm_head" in n} - set(memory)
    if policy == "lora":  # the LoRA's memory has a name of its own, and the base's layers moved into base_layer
        assert not changed & language
        lora = [tensor for name, tensor in new.items() if "lora_B" in name]
        assert any(tensor.any() for tensor in lora)
    else:
        assert set(memory) <= changed
        assert bool(changed & language) == (policy == "full")
    assert not any("visual." in name and "visual_memory" not in name for name in changed)
    recorded = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert (recorded == "./policy") == (policy == "full")

    # The whole folder may move: everything that was trained moves with it.
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    moved, _ = keepsight.load(tmp_path / "elsewhere")
    assert all(torch.equal(a, b) for a, b in zip(moved.state_dict().values(), new.values(), strict=True))
    cost = RunCost.read(tmp_path / "elsewhere")
    assert cost.steps == 3
    assert cost.tokens_generated == pytest.approx(3 * 8 * 4, abs=3 * 8 * 4 - 3 * 8)
    assert cost.tokens_trained > cost.tokens_generated > 0


def test_rewarded_words_become_more_likely(tiny_vlm: Path, prompts: Path, tmp_path: Path) -> None:
    report = train_pvm_grpo(
        tiny_vlm,
        prompts,
        tmp_path / "out",
        settings=settings(max_steps=25, lr=5e-3, rewards=("rl_rewards:dots",), save_steps=100),
    )
    assert report.first_reward is not None
    assert report.last_reward is not None
    assert report.first_reward < 0.2
    assert report.last_reward > 0.6


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {f"policy.{n}": t for n, t in load_file(folder / "policy" / "model.safetensors").items()}
    return {**found, **load_file(folder / WEIGHTS)}


def test_a_killed_run_resumes_to_the_same_weights(
    trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path
) -> None:
    # Four prompts' completions are written at a time and eight make an epoch: a kill falls into a later epoch, whose
    # order must be repeated.
    options: dict[str, Any] = {"max_steps": 9, "save_steps": 3, "rows_per_rollout": 4, "lr": 1e-3}
    whole = train_pvm_grpo(trained[0], prompts, tmp_path / "whole", settings=settings(**options))
    out = tmp_path / "killed"
    flags = {"max-steps": 9, "save-steps": 3, "rows-per-rollout": 4, "lr": 1e-3, "batch-size": 4, "grad-accum": 2}
    flags |= {"group-size": 4, "max-new-tokens": 4, "reward": "rl_rewards:length", "logging-steps": 1}
    command = [sys.executable, "-m", "keepsight.cli", "train", "pvm-grpo", str(trained[0]), "-d", str(prompts)]
    command += ["-o", str(out), "--no-mask-truncated"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while last_checkpoint(out)[0] is None and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (out / WEIGHTS).exists()

    report = train_pvm_grpo(trained[0], prompts, out, settings=settings(**options), resume=True)
    assert report.resumed_from is not None
    assert report.base_unchanged is True
    first, second = tensors(tmp_path / "whole"), tensors(out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (report.tokens, report.gates, report.last_reward) == (whole.tokens, whole.gates, whole.last_reward)
    assert report.cost is not None
    assert report.cost.sessions == 2
    # With other answers it is another run.
    write_rows(prompts, [{**row, "answer": "never"} for row in read_rows(prompts)])
    with pytest.raises(OutputError, match="digest of the data"):
        train_pvm_grpo(trained[0], prompts, out, settings=settings(**options), resume=True)


def test_a_lora_beside_the_memory_resumes_too(trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"policy": "lora", "lora_rank": 2, "settings": settings(max_steps=4)}
    train_pvm_grpo(trained[0], prompts, tmp_path / "whole", **options)
    shutil.copytree(
        tmp_path / "whole", tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoint-4", "*.safetensors")
    )
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "broken" / "checkpoint-2", dirs_exist_ok=True)
    report = train_pvm_grpo(trained[0], prompts, tmp_path / "broken", **options, resume=True)
    assert report.resumed_from == 2
    for name in (WEIGHTS, f"policy/{WEIGHTS}"):
        first, second = (load_file(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_damaged_policy_spoils_a_checkpoint(trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_pvm_grpo(trained[0], prompts, out, settings=settings())
    file = out / "checkpoint-3" / "policy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found, broken = last_checkpoint(out)
    assert found == out / "checkpoint-2"
    assert "cut off or damaged" in broken[0]


def test_every_family_is_refined(family: TinyFamily, prompts: Path, tmp_path: Path) -> None:
    base = family_folder(family, tmp_path / "base")
    pvm = keepsight.PvmConfig(layers=[1, 3], width=32)
    now = settings(max_steps=1, gate_lr_multiplier=100.0, batch_size=8, grad_accum=1, rewards=("rl_rewards:ids",))
    report = train_pvm_grpo(base, prompts, tmp_path / "out", pvm=pvm, policy="none", settings=now)
    assert report.base_unchanged is True
    assert any(report.gates.values())  # the rewards have reached it


def test_several_images_where_trl_loses_their_number_are_refused(prompts: Path, tmp_path: Path) -> None:
    base = family_folder(BY_NAME["llava_onevision"], tmp_path / "base")
    two = [{**row, "images": [row["image"]] * 2, "image": None} for row in read_rows(prompts)]
    with pytest.raises(KeepsightError, match=r"2 images.*give every prompt one image"):
        train_pvm_grpo(base, write_rows(prompts, two), tmp_path / "out", policy="none", settings=settings())


def test_the_policy_learns_in_float32_whatever_the_base_is_stored_in(
    tiny_vlm: Path, prompts: Path, tmp_path: Path
) -> None:
    model, processor = keepsight.load(tiny_vlm, dtype="bfloat16")
    model.save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    with pytest.warns(KeepsightWarning, match="has no memory yet"):
        report = train_pvm_grpo(tmp_path / "half", prompts, tmp_path / "out", settings=settings(lr=1e-6, max_steps=1))
    assert report.base_unchanged is True
    stored = load_file(tmp_path / "half" / "model.safetensors")
    now = load_file(tmp_path / "out" / "policy" / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    moved = (now[name] - stored[name].float()).abs().max()
    assert now[name].dtype == torch.float32
    assert 0 < moved < 1e-5  # in bfloat16 nothing would have moved


def test_a_kl_term_counts_from_the_start(trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path) -> None:
    logs: list[dict[str, float]] = []
    report = train_pvm_grpo(
        trained[0],
        prompts,
        tmp_path / "out",
        policy="none",
        settings=settings(kl=0.1, max_steps=2, lr=1e-2),
        on_log=lambda values, step, total: logs.append(values),
    )
    assert [values["kl"] > 1e-6 for values in logs if "kl" in values] == [False, True]
    assert not (tmp_path / "out" / "ref").exists()
    assert report.gates != trained[1].gates


def test_controls_go_on_from_their_own_first_stage(tiny_vlm: Path, data: Path, prompts: Path, tmp_path: Path) -> None:
    first = SftSettings(max_steps=1, batch_size=4, grad_accum=1, lr=1e-2, save_steps=2)
    pvm = keepsight.PvmConfig(layers=[1, 3], width=32)
    tuned = (Control("lora"), Control("sft", 1e-3))
    before = train_pvm(tiny_vlm, data, tmp_path / "sft", pvm=pvm, settings=first, controls=tuned)
    report = train_pvm_grpo(
        tmp_path / "sft",
        prompts,
        tmp_path / "out",
        policy="none",
        eval_dataset=prompts,
        settings=settings(max_steps=1, lr=1e-7),  # so small a step leaves the start in sight
        controls=(Control("lora"), Control("sft"), Control("none")),
    )
    outcomes = {one.name: one for one in report.comparison.outcomes}
    assert outcomes["lora"].parameters == before.comparison.outcomes[1].parameters
    assert (outcomes["none"].parameters, outcomes["none"].steps) == (0, 0)
    assert all("eval_reward" in one.metrics for one in outcomes.values())
    assert "eval_reward" in (tmp_path / "out" / "comparison.md").read_text()
    for name, file in (("lora", WEIGHTS), ("sft", "model.safetensors")):
        start, end = (load_file(tmp_path / folder / f"control-{name}" / file) for folder in ("sft", "out"))
        assert start.keys() == end.keys()
        assert all(torch.allclose(start[n].float(), end[n].float(), atol=1e-5) for n in start)
        keepsight.load(tmp_path / "out" / f"control-{name}")


@pytest.mark.parametrize(
    ("options", "changes", "lesson"),
    [
        ({}, {"kl": 0.1}, "the reference is the policy as it was at the start"),
        ({}, {"batch_size": 3}, "no whole groups of 4"),
        ({}, {"grad_accum": 32}, "8 prompts are fewer than the 32"),
        ({}, {"rewards": ("no_such:reward",)}, "the module no_such cannot be imported"),
        ({}, {"rewards": ("rl_rewards:bad",)}, "reward 'rl_rewards:bad' returned nan for completion 0"),
        ({}, {"max_length": 3}, r"messages: \d+ tokens after processing"),
        ({"pvm": keepsight.PvmConfig()}, {}, "has a memory already"),
    ],
)
def test_what_cannot_work_is_a_lesson(
    options: Any, changes: Any, lesson: str, trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises((KeepsightError, RewardError), match=lesson):
        train_pvm_grpo(trained[0], prompts, tmp_path / "out", settings=settings(**changes), **options)


def test_a_missing_answer_is_found_before_the_weights_are_read(tiny_vlm: Path, prompts: Path, tmp_path: Path) -> None:
    write_rows(prompts, [{"image": "0.png", "prompt": "read"}] * 8)
    with pytest.raises(KeepsightError, match="8 samples that cannot be used"):
        train_pvm_grpo(tiny_vlm, prompts, tmp_path / "out", settings=settings(rewards=("answer",), lr=1e-3))


def test_nothing_of_the_objective_is_left_to_the_release_of_trl(
    trained: tuple[Path, TrainReport], prompts: Path, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.args = args

    look, said = Look(), list[str]()
    chosen = settings(max_steps=1, loss_type="grpo", clip=0.1, scale_rewards="none")
    out = tmp_path / "out"
    train_pvm_grpo(trained[0], prompts, out, policy="none", settings=chosen, callbacks=[look], say=said.append)
    assert (look.args.loss_type, look.args.epsilon, look.args.epsilon_high) == ("grpo", 0.1, None)
    assert look.args.scale_rewards == "none"
    assert "GRPO: loss grpo, clip 0.1, KL 0, advantages scaled not at all" in said
    assert any("vLLM can serve" in line for line in said)
    default = GrpoSettings()
    assert (default.loss_type, default.clip, default.scale_rewards) == ("dapo", 0.2, "group")


@pytest.mark.parametrize(
    "wrong",
    [
        {"group_size": 1},
        {"temperature": 0.0},
        {"top_p": 1.5},
        {"kl": -1.0},
        {"max_new_tokens": 0},
        {"rows_per_rollout": 3},
        {"clip": 0.0},
        {"clip": 1.0},
    ],
)
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|compares"):
        settings(**wrong)


def test_defaults_are_the_papers_second_stage() -> None:
    paper = GrpoSettings()
    assert (paper.lr, paper.scheduler, paper.warmup_ratio, paper.gate_lr_multiplier) == (1e-6, "constant", 0.0, 1.0)
    assert (paper.group_size, paper.temperature, paper.top_p, paper.kl) == (8, 1.0, 1.0, 0.0)
    assert (paper.batch_size * paper.grad_accum, paper.max_new_tokens, paper.mask_truncated) == (64, 16384, True)
    assert paper.rewards == ("format", "answer")
