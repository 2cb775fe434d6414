"""Rewards: which answers are right, what the two papers' rewards pay for, and errors that name the reward."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from keepsight.errors import KeepsightWarning
from keepsight.train.rewards.answers import same_answer
from keepsight.train.rewards.rewards import Reward, RewardError, load_rewards, score_completions


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B. a dog", "B. a cat"),  # the letter decides
        ("The answer is B", "(B)"),
        (r"\boxed{B}", "B"),
        ("a cat", "B. a cat"),
        ("1,000", "1000.0"),
        (".5", "0.5"),
        ("1/2", r"\frac{1}{2}"),
        ("50%", "0.5"),
        (r"$\frac{2}{4}$", 0.5),
        ("(x-1)(x+1)", "x^2-1"),
        ("12 cm", 12),
        ("x = 3", "3"),
        ("Yes.", "yes"),
        ("The  Eiffel tower", "the Eiffel Tower"),
        ("A, C", "A,C"),
        ("two", ["2", "two"]),
    ],
)
def test_right_answers(given: str, expected: Any) -> None:
    assert same_answer(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("C", "B"),
        ("a cat", "A"),
        ("C", "B. a cat"),
        ("5", "5.1"),
        ("-5", "5"),
        ("0.333", "1/3"),
        ("12 or 13", "12"),
        ("3 dogs", "3 cats"),
        ("no", "yes"),
        ("x+2", "x+1"),
        ("", "B"),
        ("-", "3"),
        ("2", ["1", "3"]),
    ],
)
def test_wrong_answers(given: str, expected: Any) -> None:
    assert not same_answer(given, expected)


def test_an_answer_that_cannot_be_computed_is_wrong_and_costs_its_time_limit_only() -> None:
    # Two powers that no alarm breaks into. The next question is answered as if nothing had happened.
    started = time.monotonic()
    assert not same_answer("9^{9^{9^{9}}}", "7/3", seconds=0.3)
    assert time.monotonic() - started < 30
    assert same_answer("14/6", "7/3")


def test_answers_are_checked_in_any_thread() -> None:
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(same_answer("2/4", "1/2"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


GOOD = "<think>it is red</think><answer>B</answer>"


#: Zero-width spaces and joiners, a soft hyphen, a mark of order, a variation selector, fillers, wide spaces.
INVISIBLE = ("\u200b", "\u200d\u2060", "\u00ad", "\ufeff", "\u200e", "\ufe0f", "\u3164", "\u2800", "\u00a0\u3000")


@pytest.mark.parametrize(
    ("completion", "form", "answer"),
    [
        (GOOD, 1, 1),
        (f"\n{GOOD.replace('><', '> <')}\n", 1, 1),
        ([{"role": "assistant", "content": GOOD}], 1, 1),
        ([{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}], 1, 1),
        ("<think>so</think><answer>C</answer>", 1, 0),
        ("<answer>B</answer>", 0, 1),
        ("B", 0, 0),
        (f"well {GOOD}", 0, 1),
        (f"{GOOD} indeed", 0, 1),
        ("<think>so</think> hm <answer>B</answer>", 0, 1),
        ("<think>so <answer>B</answer></think>", 0, 1),
        ("<think>a</think><think>b</think><answer>B</answer>", 0, 1),
        ("<think>so</think><answer>A</answer><answer>B</answer>", 0, 0),  # guessing them all does not pay
        ("<think>so</think><answer>B", 0, 0),
        ("<think></think><answer></answer>", 0, 0),  # the form without a word in it is none
        ("<think> \n</think><answer>B</answer>", 0, 1),
        ("<think>so</think><answer> </answer>", 0, 0),
        *((f"<think>{blank}</think><answer>B</answer>", 0, 1) for blank in INVISIBLE),
        *((f"<think>so</think><answer>{blank}</answer>", 0, 0) for blank in INVISIBLE),
        ("<think>√2 > 1?</think><answer>B</answer>", 1, 1),
        ("<think>+</think><answer>★</answer>", 1, 0),
    ],
)
def test_the_papers_rewards(completion: Any, form: int, answer: int) -> None:
    rewards = load_rewards()
    assert [(reward.name, reward.weight) for reward in rewards] == [("format", 0.1), ("answer", 0.9)]
    columns = {"answer": ["B"], "level": [1]}
    total, each = score_completions(rewards, ["?"], [completion], columns)
    assert each.tolist() == [[form, answer]]
    assert torch.equal(total, torch.tensor([0.1 * form + 0.9 * answer], dtype=torch.float32))


def test_weights_and_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions, **columns):\n    return [-len(text) for text in completions]\n\n"
        "def level(completions, level):\n    return level\n"
    )
    monkeypatch.chdir(tmp_path)
    rewards = load_rewards(["match=0.5", "my_rewards:brevity=0.25", "my_rewards:level"])
    assert [reward.weight for reward in rewards] == [0.5, 0.25, 1.0]
    total, _ = score_completions(rewards, ["?"] * 2, ["B", "wrong"], {"answer": ["B", "B"], "level": [3, 4]})
    assert total.tolist() == [0.5 - 0.25 + 3, -1.25 + 4]


@pytest.mark.parametrize("made", [torch.tensor, numpy.array, tuple, list])
def test_whatever_holds_numbers_is_taken(made: Any) -> None:
    reward = Reward("own", 1.0, lambda completions: made([0.5, 1.0]))
    assert reward(["?"] * 2, ["a", "b"]) == [0.5, 1.0]


def raising(completions: Any, **columns: Any) -> list[float]:
    raise KeyError("colour")


@pytest.mark.parametrize(
    ("returned", "lesson"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        ([1.0, float("nan")], "returned nan for completion 1; expected a finite number"),
        ([float("inf"), 0.0], "returned inf for completion 0"),
        ([None, 0.0], "returned None for completion 0"),
        (["1", 0.0], "returned '1' for completion 0"),
        (1.0, "returned float; expected a list of 2 numbers"),
    ],
)
def test_a_bad_reward_is_named(returned: Any, lesson: str) -> None:
    reward = Reward("mine:bad", 1.0, lambda **_: returned)
    with pytest.raises(RewardError, match=f"^reward 'mine:bad' {lesson}"):
        reward(["?"] * 2, ["a", "b"])


def test_a_raising_reward_and_a_missing_column_are_named() -> None:
    with pytest.raises(RewardError, match=r"reward 'mine:raising' raised KeyError: 'colour'.*the columns answer"):
        Reward("mine:raising", 1.0, raising)(["?"], ["a"], answer=["b"])
    with pytest.raises(RewardError, match="reward 'answer': the data have no column \"answer\""):
        score_completions(load_rewards(["answer"]), ["?"], ["a"], {})
    with pytest.raises(RewardError, match="is empty for 1 of 2"):
        score_completions(load_rewards(["answer"]), ["?"] * 2, ["a"] * 2, {"answer": ["a", None]})


@pytest.mark.parametrize(
    ("name", "lesson"),
    [
        ("banana", "reward 'banana': expected one of format, answer, match, or an import path"),
        ("no.such.module:f", "the module no.such.module cannot be imported"),
        ("math:nothing", "the module math has no nothing"),
        ("math:pi", "is a float; expected a plain function"),
        ("answer=much", "the weight 'much' is no finite number"),
        ("answer=nan", "the weight 'nan' is no finite number"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, lesson: str) -> None:
    with pytest.raises(RewardError, match=lesson):
        load_rewards([name])


def test_weight_zero_warns_and_twins_are_refused() -> None:
    with pytest.warns(KeepsightWarning, match="weight 0"):
        load_rewards(["format=0", "answer"])
    with pytest.raises(RewardError, match="one name"):
        load_rewards(["answer", "answer=0.5"])
