"""An answer to each question about the methods, computed from their raw results; what was not run is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from studies.eye.comparing import kept
from studies.eye.comparing.methods import METHODS, NONE, Trial
from studies.eye.comparing.trials import EYE_ITSELF, GRIDS, TRAINED, Row, Rows, Training
from studies.eye.gate import STYLE
from studies.eye.shares import Gap, gap

PVM = ("pvm", "pvm-warm")
FAR = (1024, 2048)


def answers(rows: Rows, language: kept.Rows) -> list[tuple[str, str]]:
    """Each question of the issue, and what the numbers say to it."""
    looked_up = partial(_memory_gap, one="own", other="other", key="right")
    helped = partial(_memory_gap, one="own", other="off", key="right")
    misled = partial(_memory_gap, one="other", other="off", key="follows")
    own = "Right with the own memory minus another image's"
    far = "Right at 1,024 and 2,048 tokens, minus"
    as_long = f"trained the same, or where that was not run in {Trial.steps} steps up to {min(TRAINED)}"

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
        (
            question,
            f"{what}. "
            + " ".join(
                f"{where}: {_listed({row.name: _judged(by(row, images)) for row in these})}"
                for where, images in (("In grids", GRIDS), ("In the unseen style", STYLE))
            ),
        )
        for question, what, these, by in found
    ]
    told.append(("Could a check while it runs notice, by asking again without the memory?", _differences(of(*PVM))))
    told.append(("Does the language stay?", _stays(of(*METHODS), language)))
    return told


def _judged(found: Gap | None) -> str | None:
    """Yes where the interval lies above zero."""
    if found is None:
        return None
    word = "yes" if found.low > 0 else "the contrary" if found.high < 0 else "not shown"
    return f"*{word}*, {found.told()}"


def _listed(told: Mapping[str, str | None]) -> str:
    """Of each row what is told; those of which nothing is were not run."""
    found = [f"{name} {what}" for name, what in told.items() if what is not None]
    missing = [name for name, what in told.items() if what is None]
    if not found:
        return "*not run*."
    return "; ".join([*found, f"*not run*: {', '.join(missing)}"] if missing else found) + "."


def _memory_gap(row: Row, images: str, one: str, other: str, key: str) -> Gap | None:
    """Points between two memories, over all lengths."""
    return _points(row.memory(images, one, key), row.memory(images, other, key))


def _far(rows: Rows, other: str, row: Row, images: str, condition: str = "base") -> Gap | None:
    """Points between two methods behind long narrations; the eye itself is the same for every seed."""
    these = _long(row, images, "base")
    if other != NONE:
        rivals = (rows.get(row.of._replace(method=other)), rows.get(Training(other, min(TRAINED))))
        rival = next((one for one in rivals if one and one.raw), None)
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


def _differences(these: list[Row]) -> str:
    """How often an answer is another one than without the memory, of right, wrong and misled ones."""

    def told(row: Row) -> str | None:
        if not row.memory_lengths():
            return None
        right, wrong = (_differing(row, "own", "right", bit) for bit in "10")
        misled = _differing(row, "other", "follows", "1")
        return f"of the right {right}, of the wrong {wrong}, of the misled {misled}"

    what = "Answers that are others than without the memory (misled: with another image's, and naming what it shows)"
    return f"{what}: {_listed({row.name: told(row) for row in these})}"


def _differing(row: Row, memory: str, key: str, bit: str) -> str:
    differ = count = 0
    for images in (GRIDS, STYLE):
        found = (row.memory(images, *of) for of in ((memory, key), (memory, "said"), ("off", "said")))
        for all_bits, all_said, all_plain in zip(*(by_seed.values() for by_seed in found), strict=True):
            for bits, said, plain in zip(all_bits, all_said, all_plain, strict=True):
                chosen = [one != two for b, one, two in zip(bits, said, plain, strict=True) if b == bit]
                differ, count = differ + sum(chosen), count + len(chosen)
    return f"{100 * differ / count:.0f} % of {count}" if count else "none"


def _stays(these: list[Row], language: kept.Rows) -> str:

    def told(row: Row) -> str | None:
        known = row.label in language
        alone, behind = (kept.against_eye(language, row.label, image) if known else None for image in (False, True))
        if alone is None or behind is None:
            return None
        word = "no" if max(alone.low, behind.low) > 0 else "no loss shown"
        return f"*{word}*, {alone.told('nats', 3)} and {behind.told('nats', 3)}"

    what = "Nats that a token of the text costs more than with the eye, alone and behind an image"
    return f"{what}: {_listed({row.name: told(row) for row in these})}"
