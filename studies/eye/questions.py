"""What is asked about an image, in several wordings, with answers in plain English."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from studies.eye.drawings.brush import COLOURS

TASKS = ("name", "colour", "style", "place", "count", "compare", "read")
_COLOURS = tuple(COLOURS)
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "centre", "right")}


@dataclass(frozen=True)
class Cell:
    """One picture: what it shows, or what is written on it, how it is drawn, and the colour of its paper.

    `style` is empty for writing; `text` for drawings.
    """

    name: str
    style: str
    colour: int
    text: str = ""


@dataclass(frozen=True)
class Question:
    """A question and its answer."""

    task: str
    text: str
    answer: str


def place(number: int, side: int) -> str:
    """The name of a cell: "top left"."""
    return f"{_ROWS[side][number // side]} {_COLUMNS[side][number % side]}"


def tasks_of(cells: list[Cell], side: int) -> list[str]:
    """What can be asked about these cells."""
    drawn = [cell.name for cell in cells if not cell.text]
    return [
        task
        for task, possible in (
            ("name", bool(drawn)),
            ("colour", True),
            ("style", bool(drawn)),
            ("place", side > 1 and any(drawn.count(name) == 1 for name in drawn)),
            ("count", side > 1),
            ("compare", side > 1 and len(drawn) > 1),
            ("read", any(cell.text for cell in cells)),
        )
        if possible
    ]


def ask(task: str, cells: list[Cell], side: int, draws: torch.Generator) -> Question:
    """One question of a task about cells, row by row; the wording is drawn."""

    def one(options: list[str] | list[int]) -> str | int:
        return options[int(torch.randint(len(options), (1,), generator=draws))]

    def numbers(written: bool) -> list[int]:
        return [number for number, cell in enumerate(cells) if bool(cell.text) == written]

    def worded(*wordings: str) -> str:
        return str(one(list(wordings)))

    def where(number: int) -> str:
        return f" in the {place(number, side)}" if side > 1 else ""

    if task == "name":
        number = int(one(numbers(False)))
        text = worded("What is{}?", "What do you see{}?", "Name the thing{}.", "Which thing is drawn{}?")
        here = where(number) or " here"
        return Question(task, text.format(here), named(cells[number].name))
    if task == "colour":
        number = int(one(list(range(len(cells)))))
        text = worded(
            "What colour is the background{}?", "Which colour is the paper{}?", "Name the background colour{}."
        )
        return Question(task, text.format(where(number)), f"It is {_COLOURS[cells[number].colour]}.")
    if task == "style":
        number = int(one(numbers(False)))
        text = worded("In which style is the picture{} drawn?", "Which drawing style is used{}?")
        return Question(task, text.format(where(number)), f"In the style of {cells[number].style}.")
    if task == "place":
        drawn = [cells[number].name for number in numbers(False)]
        name = str(one([name for name in drawn if drawn.count(name) == 1]))
        number = next(number for number, cell in enumerate(cells) if cell.name == name and not cell.text)
        return Question(
            task,
            worded("Where is the {}?", "In which corner is the {}?").format(name),
            f"In the {place(number, side)}.",
        )
    if task == "count":
        if int(torch.randint(2, (1,), generator=draws)):
            colour = cells[int(one(list(range(len(cells)))))].colour
            total = sum(cell.colour == colour for cell in cells)
            text = worded("How many pictures have {} paper?", "How many backgrounds are {}?").format(_COLOURS[colour])
        else:
            written = bool(int(torch.randint(2, (1,), generator=draws)))
            total = len(numbers(written))
            text = f"How many of the pictures show {'writing' if written else 'things'}?"
        return Question(task, text, f"{_NUMBERS[total].capitalize()}.")
    if task == "compare":
        drawn_numbers = numbers(False)
        first = int(one(drawn_numbers))
        twins = [n for n in drawn_numbers if n != first and cells[n].name == cells[first].name]
        others = [n for n in drawn_numbers if n != first]
        second = int(one(twins)) if twins and int(torch.randint(2, (1,), generator=draws)) else int(one(others))
        text = worded("Do the {} and the {} show the same thing?", "Is the same thing in the {} and in the {}?")
        same = cells[first].name == cells[second].name
        return Question(task, text.format(place(first, side), place(second, side)), "Yes." if same else "No.")
    assert task == "read", task
    number = int(one(numbers(True)))
    text = worded("What is written{}?", "What does the writing{} say?", "Read what is written{}.")
    return Question(task, text.format(where(number)), f"It says {cells[number].text}.")


def named(name: str) -> str:
    """The answer that a thing of this name is seen."""
    return f"{'An' if name[0] in 'aeiou' else 'A'} {name}."
