"""Rewards for reinforcement learning: the papers' two, and any function of your own by its import path.

A reward follows TRL's convention: it is called as `f(prompts=..., completions=..., **columns)`, where `columns` are the
data's other columns, such as `answer`, one entry per completion; and it returns one number per completion. The papers
(arXiv 2605.00814, section 5; VisMem takes the same form) add 0.1 for a completion of exactly
`<think>...</think><answer>...</answer>` to 0.9 for a correct `<answer>`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.rewards import DEFAULT_REWARDS
from keepsight.train.rewards.answers import same_answer

_TAG = re.compile(r"</?(?:think|answer)>")
_FORM = ["<think>", "</think>", "<answer>", "</answer>"]


class RewardError(KeepsightError):
    """A reward cannot be loaded, or does not return one finite number per completion."""


@dataclass(frozen=True)
class Reward:
    """A named, weighted reward, which answers for what its function returns.

    Attributes:
        name: as the user wrote it, without the weight.
        weight: what the function's numbers are multiplied by in the sum.
        function: `f(prompts=..., completions=..., **columns)` -> one number per completion, not yet weighted.
    """

    name: str
    weight: float
    function: Callable[..., Sequence[float]]

    @property
    def __name__(self) -> str:  # TRL names its log entries by this
        return self.name.rpartition(":")[2]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """One finite number per completion, not weighted.

        Args:
            prompts: n prompts, text or lists of messages.
            completions: n completions, text or lists of messages.
            columns: lists of n entries, and whatever a trainer adds.

        Raises:
            RewardError: naming this reward, if its function raises, or returns anything but n finite numbers.
        """
        try:
            given = self.function(**self._accepted({"prompts": prompts, "completions": completions, **columns}))
        except RewardError as error:
            raise RewardError(f"reward {self.name!r}: {error}") from error
        except ImportError:
            raise
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error}. It was called with {len(completions)} "
                f"completions and the columns {', '.join(sorted(columns)) or 'none'}."
            ) from error
        return self._checked(given, len(completions))

    def _accepted(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the function can take: all, if it has **kwargs."""
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return columns
        return {name: value for name, value in columns.items() if name in parameters}

    def _checked(self, given: Any, count: int) -> list[float]:
        values = given.tolist() if hasattr(given, "tolist") else given  # a tensor, or an array
        if not isinstance(values, (list, tuple)):
            raise RewardError(
                f"reward {self.name!r} returned {type(given).__name__}; expected a list of {count} numbers, one per "
                "completion."
            )
        if len(values) != count:
            raise RewardError(
                f"reward {self.name!r} returned {len(values)} numbers for {count} completions; expected one for each."
            )
        for index, value in enumerate(values):
            number = isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0
            if not number or not math.isfinite(value):
                raise RewardError(
                    f"reward {self.name!r} returned {value!r} for completion {index}; expected a finite number. Return "
                    "0.0 for a completion that cannot be judged."
                )
        return [float(value) for value in values]


def load_rewards(names: Sequence[str] = DEFAULT_REWARDS) -> list[Reward]:
    """Rewards by name.

    Args:
        names: each "format", "answer", "match", or an import path "package.module:function"; with "=0.5" behind it for
            another weight than the default (format 0.1, answer 0.9, others 1). Modules in the working directory are
            found.

    Raises:
        RewardError: naming the one that cannot be loaded.
    """
    if not names:
        raise RewardError(f"no rewards are given; expected names such as {', '.join(DEFAULT_REWARDS)}.")
    rewards = [_load(text) for text in names]
    seen = [reward.__name__ for reward in rewards]
    if len(set(seen)) < len(seen):
        raise RewardError(f"two rewards have one name, so logs could not tell them apart: {', '.join(names)}.")
    for reward in rewards:
        if reward.weight == 0:
            warnings.warn(
                f"reward {reward.name!r} has weight 0: it is computed and has no effect.",
                KeepsightWarning,
                stacklevel=2,
            )
    return rewards


def score_completions(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score completions.

    Args:
        rewards: from `load_rewards`.
        prompts: n prompts, text or lists of messages.
        completions: n completions, text or lists of messages.
        columns: name -> list of n entries, such as {"answer": [...]}.

    Returns:
        The weighted sum of all rewards, float32 [n]; and each of them, not weighted: float32 [n, len(rewards)].

    Raises:
        RewardError: naming the reward that failed.
    """
    scores = [reward(prompts, completions, **columns) for reward in rewards]
    each = torch.tensor(scores, dtype=torch.float32).reshape(len(rewards), len(completions)).T
    return each @ torch.tensor([reward.weight for reward in rewards], dtype=torch.float32), each


# ----------------------------------------------------------------------------------------------- the built-in functions


def format_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for exactly `<think>...</think><answer>...</answer>`, each tag once and around words, with nothing else beside.

    The paper's form, but for one thing: tags around nothing that can be seen (empty, spaces, zero-width characters),
    which would earn it without a thought, earn nothing.
    """
    return [float(_has_form(text_of(completion))) for completion in completions]


def answer_reward(completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any) -> list[float]:
    """1 where the one `<answer>...</answer>` of a completion is right (`keepsight.train.rewards.answers.same_answer`).

    A completion with several answers has none: otherwise guessing them all would pay.
    """
    expected = _answers(answer, len(completions))
    given = [re.findall(r"<answer>(.*?)</answer>", text_of(one), re.DOTALL) for one in completions]
    return [float(len(g) == 1 and same_answer(g[0], e)) for g, e in zip(given, expected, strict=True)]


def match_reward(completions: Sequence[Any], answer: Sequence[Any] | None = None, **columns: Any) -> list[float]:
    """1 where the whole completion is the answer: for models that answer without tags."""
    expected = _answers(answer, len(completions))
    return [float(same_answer(text_of(one), e)) for one, e in zip(completions, expected, strict=True)]


BUILT_IN: dict[str, tuple[Callable[..., list[float]], float]] = {
    "format": (format_reward, 0.1),
    "answer": (answer_reward, 0.9),
    "match": (match_reward, 1.0),
}
"""Name -> (function, default weight)."""


def needs_answer(rewards: Sequence[Reward]) -> bool:
    """Whether any of the rewards compares with the column "answer"."""
    return any(reward.function in (answer_reward, match_reward) for reward in rewards)


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or that of its messages."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message["content"]
        texts.append(content if isinstance(content, str) else "".join(part.get("text", "") for part in content))
    return "".join(texts)


def _has_form(text: str) -> bool:
    before, thought, between, said, after = _TAG.split(text) if _TAG.findall(text) == _FORM else [""] * 5
    return _is_seen(thought) and _is_seen(said) and not (before + between + after).strip()


def _is_seen(text: str) -> bool:
    """Whether a reader sees anything of it: not of spaces of any width, marks with no letter, or letters of no ink."""
    return any(
        unicodedata.category(char)[0] in "LNPS" and not unicodedata.name(char, "").endswith(("FILLER", "BLANK"))
        for char in text
    )


def _answers(answer: Sequence[Any] | None, count: int) -> Sequence[Any]:
    if answer is None:
        raise RewardError('the data have no column "answer"; add one with the right answer of every sample.')
    missing = [index for index, one in enumerate(answer) if one is None or one == ""]
    if missing:
        raise RewardError(f'the column "answer" is empty for {len(missing)} of {count} completions.')
    return answer


# -------------------------------------------------------------------------------------------------------------- loading


def _load(text: str) -> Reward:
    name, weighted, number = text.partition("=")
    name = name.strip()
    if name in BUILT_IN:
        function, weight = BUILT_IN[name]
    else:
        function, weight = _import(name), 1.0
    if weighted:
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise RewardError(f"reward {text!r}: the weight {number!r} is no finite number; write {name}=0.5.")
    return Reward(name, weight, function)


def _import(path: str) -> Callable[..., Any]:
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise RewardError(
            f"reward {path!r}: expected one of {', '.join(BUILT_IN)}, or an import path package.module:function."
        )
    with _working_directory_importable():
        try:
            function = importlib.import_module(module_name)
        except Exception as error:  # a user's module may raise anything
            raise RewardError(
                f"reward {path!r}: the module {module_name} cannot be imported ({type(error).__name__}: {error}). "
                "It is looked for in the working directory and in the environment."
            ) from error
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise RewardError(f"reward {path!r}: the module {module_name} has no {attribute}.")
        function = getattr(function, part)
    if not callable(function) or inspect.iscoroutinefunction(function):
        what = "an async function" if callable(function) else f"a {type(function).__name__}"
        raise RewardError(
            f"reward {path!r} is {what}; expected a plain function f(prompts, completions, **columns) that returns a "
            "list of numbers."
        )
    return function


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
