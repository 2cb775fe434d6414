"""An answer to each question about the methods, computed from their raw results; what was not run is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from studies.eye.comparing import kept
from studies.eye.comparing.methods import METHODS, NONE, Trial
from studies.eye.comparing.trials import EYE_ITSELF, GRIDS, TRAINED, Row, Rows, Training
from studies.eye.gate import STYLE
from studies.eye.shares import Gap, gap

PVM = ("pvm", "pvm-warm")
FAR = (1024, 2048)
_WHERE = {"in grids": GRIDS, "in the unseen style": STYLE}


@dataclass(frozen=True)
class Answer:
    """What the numbers say to a question.

    Args:
        question: as a reader asks it.
        what: what was measured.
        columns: names of what is told of each training.
        rows: for each training as many cells, empty where it was not measured.
    """

    question: str
    what: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[str, ...]]

    def lines(self) -> list[str]:
        """Markdown: a table of the trainings that were measured, or that none was."""
        found = [f"| {name} | " + " | ".join(cells) + " |" for name, cells in self.rows.items() if any(cells)]
        told = f"**{self.question}** {self.what}"
        if not found:
            return [f"{told}: *not run*.", ""]
        head = ["| | " + " | ".join(self.columns) + " |", "|---|" + "---|" * len(self.columns)]
        return [f"{told}:", "", *head, *found, ""]


def answers(rows: Rows, language: kept.Rows) -> list[Answer]:
    """To each question of the issue."""
    looked_up = partial(_memory_gap, one="own", other="other", key="right")
    helped = partial(_memory_gap, one="own", other="off", key="right")
    misled = partial(_memory_gap, one="other", other="off", key="follows")
    own = "Right with the own memory minus another image's"
    far = "Right at 1,024 and 2,048 tokens, minus"
    plainly = f"in {Trial.steps} steps at the same lengths, or where neither was run up to {min(TRAINED)}"
    as_long = f"trained the same, or where that was not run {plainly}"

    def of(*methods: str, longer: bool = False) -> list[Row]:
        short = min(TRAINED) if longer else -1
        return [
            row for method in methods for row in rows.values() if row.of.method == method and row.of.longest > short
        ]

    found: list[tuple[str, str, list[Row], Callable[[Row, str], Gap | None]]] = [
        ("With a pretrained language model, does the look-up form by plain SFT?", own, of("pvm"), looked_up),
        ("And with the warm-up?", own, of("pvm-warm"), looked_up),
        ("Does the memory help?", "Right with the own memory minus none", of(*PVM), helped),
        *(
            (
                f"Does PVM read better than {rival}?",
                f"{far} {rival} {as_long}",
                of(*PVM),
                partial(_far, rows, rival),
            )
            for rival in ("lora", "sft", "mlp")
        ),
        (
            "And better than the image repeated behind the narration, without any training?",
            f"{far} the eye's with the image repeated",
            of("pvm-warm", "lora", "sft"),
            partial(_far, rows, NONE, condition="repeated"),
        ),
        (
            "Was it the unfamiliar text that the eye stumbled over?",
            f"{far} the eye itself",
            of("lora", "sft"),
            partial(_far, rows, NONE),
        ),
        (
            "Is something left behind training that hiding the narration brings back?",
            "Right at 1,024 and 2,048 tokens, hidden minus seen",
            of("lora", "sft", *PVM),
            _hidden,
        ),
        (
            "Does training on long narrations read better behind them than training on short ones?",
            f"{far} the same method trained up to 256",
            of(*METHODS, longer=True),
            partial(_longer, rows),
        ),
        (
            "Does another image's memory make the model name what is not there?",
            "Names that the other image alone shows, with its memory minus none",
            of(*PVM),
            misled,
        ),
    ]
    told = [
        Answer(
            question,
            what,
            tuple(_WHERE),
            {row.name: tuple(_judged(by(row, images)) for images in _WHERE.values()) for row in these},
        )
        for question, what, these, by in found
    ]
    return [*told, _differences(of(*PVM)), _stays(of(*METHODS), language)]


def _judged(found: Gap | None) -> str:
    """Yes where the interval lies above zero; nothing where nothing was found."""
    if found is None:
        return ""
    word = "yes" if found.low > 0 else "the contrary" if found.high < 0 else "not shown"
    return f"*{word}*, {found.told()}"


def _memory_gap(row: Row, images: str, one: str, other: str, key: str) -> Gap | None:
    """Points between two memories, over all lengths."""
    return _points(row.memory(images, one, key), row.memory(images, other, key))


def _far(rows: Rows, other: str, row: Row, images: str, condition: str = "base") -> Gap | None:
    """Points between two methods behind long narrations; the eye itself is the same for every seed."""
    these = _long(row, images, "base")
    if other != NONE:
        rivals = (row.of._replace(method=other), Training(other, row.of.longest), Training(other, min(TRAINED)))
        rival = next((rows[one] for one in rivals if one in rows and rows[one].raw), None)
        return _points(these, _long(rival, images, "base")) if rival else None
    eye = list(_long(rows[EYE_ITSELF], images, condition).values())
    return _points(these, dict.fromkeys(these, eye[0])) if eye else None


def _longer(rows: Rows, row: Row, images: str) -> Gap | None:
    short = rows.get(row.of._replace(longest=min(TRAINED)))
    return _points(_long(row, images, "base"), _long(short, images, "base")) if short else None


def _hidden(row: Row, images: str) -> Gap | None:
    return _points(_long(row, images, "hidden"), _long(row, images, "base"))


def _long(row: Row, images: str, condition: str) -> dict[int, list[str]]:
    near, far = (row.right(images, length, condition) for length in FAR)
    return {seed: [near[seed], far[seed]] for seed in near}


def _points(these: Mapping[int, list[str]], those: Mapping[int, list[str]]) -> Gap | None:
    """In percent, of "1" and "0" for each image at each of several lengths, `[lengths][images]`."""

    def shares(found: Mapping[int, list[str]]) -> dict[int, list[float]]:
        return {
            seed: [100 * column.count("1") / len(column) for column in zip(*bits, strict=True)]
            for seed, bits in found.items()
        }

    return gap(shares(these), shares(those))


def _differences(these: list[Row]) -> Answer:
    """How often an answer is another one than without the memory, of right, wrong and misled ones."""

    def told(row: Row) -> tuple[str, ...]:
        right, wrong = (_differing(row, "own", "right", bit) for bit in "10")
        return right, wrong, _differing(row, "other", "follows", "1")

    return Answer(
        "Could a check while it runs notice, by asking again without the memory?",
        "Answers that are others than without the memory (misled: with another image's, and naming what it shows)",
        ("of the right", "of the wrong", "of the misled"),
        {row.name: told(row) for row in these if row.memory_lengths()},
    )


def _differing(row: Row, memory: str, key: str, bit: str) -> str:
    differ = count = 0
    for images in (GRIDS, STYLE):
        found = (row.memory(images, *of) for of in ((memory, key), (memory, "said"), ("off", "said")))
        for all_bits, all_said, all_plain in zip(*(by_seed.values() for by_seed in found), strict=True):
            for bits, said, plain in zip(all_bits, all_said, all_plain, strict=True):
                chosen = [one != two for b, one, two in zip(bits, said, plain, strict=True) if b == bit]
                differ, count = differ + sum(chosen), count + len(chosen)
    return f"{100 * differ / count:.0f} % of {count}" if count else "none"


def _stays(these: list[Row], language: kept.Rows) -> Answer:
    def told(row: Row) -> tuple[str, ...]:
        if row.label not in language:
            return "", ""
        against = [kept.against_eye(language, row.label, image) for image in (False, True)]
        words = ("" if gap is None else "no" if gap.low > 0 else "no loss shown" for gap in against)
        return tuple(
            f"*{word}*, {gap.told('nats', 3)}" if gap else "" for word, gap in zip(words, against, strict=True)
        )

    return Answer(
        "Does the language stay?",
        "Nats that a token of the text costs more than with the eye",
        ("text alone", "behind an image"),
        {row.name: told(row) for row in these},
    )
