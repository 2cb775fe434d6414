"""Every question answered with the memory and without, scored, and compared by the length of the answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keepsight.checkpoints.atomic import write_text
from keepsight.diagnose.cases import Sample
from keepsight.diagnose.statistics import Estimate, estimate, strata
from keepsight.errors import KeepsightError
from keepsight.evaluate.answering import Answer, Answerer, Question
from keepsight.evaluate.keeping import Kept
from keepsight.evaluate.scoring import RULES, is_right
from keepsight.evaluate.settings import OFF, ON, EvalSettings
from keepsight.words import counted

__all__ = ["EvalSettings", "Evaluation", "Stratum", "evaluate"]
SCHEMA = "keepsight.eval/1"


@dataclass(frozen=True)
class Stratum:
    """Questions whose answers are about equally long.

    Attributes:
        shortest, longest: tokens of the answers without the memory (of a model without one: of its answers).
        on, off: share answered rightly; `on` is None for a model without a memory.
        difference: on - off, over the same questions, with its 95 % interval.
    """

    n: int
    shortest: int
    longest: int
    off: Estimate
    on: Estimate | None = None
    difference: Estimate | None = None


@dataclass
class Evaluation:
    """All answers, and what follows from them.

    Attributes:
        settings: how they were asked for.
        references: of each question, the answers any of which is right.
        off, on: what was answered; `on` is None for a model without a memory.
        model: what it is, for the report.
    """

    settings: EvalSettings
    references: list[tuple[str, ...]]
    off: list[Answer]
    on: list[Answer] | None = None
    model: dict[str, Any] = field(default_factory=dict)

    def right(self, which: str) -> np.ndarray:
        """Bool [n]: which answers are right."""
        answers = self.on if which == ON else self.off
        assert answers is not None
        pairs = zip(answers, self.references, strict=True)
        return np.array([is_right(answer.text, references, self.settings.match) for answer, references in pairs])

    @property
    def rule(self) -> str:
        """When an answer is right, in words."""
        several = sum(len(one) > 1 for one in self.references)
        have = f"{counted(several, 'question')} {'has' if several == 1 else 'have'} several"
        any_of = f"; any of the references counts ({have})" if several else ""
        return f"{self.settings.match}: {RULES[self.settings.match]}{any_of}"

    def table(self) -> tuple[list[Stratum], Stratum]:
        """Strata from the shortest answers to the longest, and all together."""
        lengths = np.array([answer.tokens for answer in self.off])
        off = self.right(OFF).astype(float)
        on = None if self.on is None else self.right(ON).astype(float)
        groups = strata(lengths, self.settings.strata)

        def stratum(rows: np.ndarray) -> Stratum:
            seed, span = self.settings.seed, (int(lengths[rows].min()), int(lengths[rows].max()))
            base = estimate(off[rows], seed)
            if on is None:
                return Stratum(len(rows), *span, base)
            return Stratum(len(rows), *span, base, estimate(on[rows], seed), estimate((on - off)[rows], seed))

        return [stratum(rows) for rows in groups], stratum(np.concatenate(groups))

    def save(self, file: Path) -> None:
        """Settings, table, and every answer, as JSON."""
        strata, whole = self.table()
        right = {OFF: self.right(OFF)} | ({} if self.on is None else {ON: self.right(ON)})
        answers = {OFF: self.off} | ({} if self.on is None else {ON: self.on})
        rows = [
            {"references": list(references)}
            | {name: asdict(given[i]) | {"right": bool(right[name][i])} for name, given in answers.items()}
            for i, references in enumerate(self.references)
        ]
        report = {
            "schema": SCHEMA,
            "model": self.model,
            "settings": asdict(self.settings),
            "rule": self.rule,
            "all": asdict(whole),
            "strata": [asdict(one) for one in strata],
            "answers": rows,
        }
        write_text(file, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    settings: EvalSettings,
    has_memory: bool,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    kept: Kept | None = None,
) -> Evaluation:
    """Ask every question, without the memory and, if there is one, with it.

    Args:
        model: a supported VLM, with or without adapters.
        processor: its processor.
        samples: with references.
        settings: how.
        has_memory: whether the model carries a memory to compare.
        progress: called as (stage, done, total).
        kept: answers of an earlier run of the same, which are not asked again; new ones are added.

    Raises:
        KeepsightError: if a sample has no reference.
    """
    if not samples:
        raise KeepsightError("There is no question to ask.")
    for number, sample in enumerate(samples, 1):
        if sample.answer is None or sample.reply:
            what = "has no answer to compare with" if sample.answer is None else "begins the reply, which this cannot"
            raise KeepsightError(f"Question {number} ({sample.prompt[:40]!r}) {what}.")
    questions = [Question(sample.messages, sample.images, sample.videos) for sample in samples]

    def ask(memory: str, stage: str) -> list[Answer]:
        answerer, found = Answerer(model, processor, memory), [] if kept is None else kept.answers(memory)
        for start in range(len(found), len(questions), settings.batch_size):
            new = answerer.answers(questions[start : start + settings.batch_size], settings.max_new_tokens)
            found += new
            if kept is not None:
                kept.add(memory, new)
            progress(stage, len(found), len(questions))
        return found

    result = Evaluation(settings, [sample.references for sample in samples], [])
    if has_memory:
        result.on = ask(settings.memory, f"memory {settings.memory}")
    result.off = ask(OFF if has_memory else ON, "memory off" if has_memory else "questions")
    return result
