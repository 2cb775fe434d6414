"""Images of one picture or a grid of pictures, and what stands in them."""

from __future__ import annotations

import torch

from studies.eye.drawings import brush, restyle
from studies.eye.drawings.pictures import SIDE, Pictures
from studies.eye.questions import Cell

_WRITING = 0.2
"""Share of the cells that hold writing."""
_AGAIN = 0.25
"""Share of the cells that repeat one before them, so that there is something to count and to compare."""


class Scenes:
    """Draws cells of given styles.

    Args:
        pictures: all drawings.
        styles: those to draw from.
        fonts: those to write with.
        firsts: only a concept's first drawing.
        writing: share of the cells that hold writing.
    """

    def __init__(
        self,
        pictures: Pictures,
        styles: list[str],
        fonts: tuple[str, ...] = brush.FONTS,
        firsts: bool = False,
        writing: float = _WRITING,
    ):
        self.pictures, self.fonts, self.writing = pictures, fonts, writing
        known = set(pictures.concepts)
        self.numbers: dict[str, list[int]] = {}
        about = zip(pictures.names, pictures.styles, pictures.firsts, strict=True)
        for number, (name, style, first) in enumerate(about):
            if name in known and style in styles and (first or not firsts):
                self.numbers.setdefault(name, []).append(number)
        self.names = sorted(self.numbers)
        self.short = [word for word in self.names if len(word) <= 5]

    def image(
        self, side: int, cell: int, vary: float, draws: torch.Generator, name: str | None = None, bold: bool = False
    ) -> tuple[torch.Tensor, list[Cell]]:
        """One image `[1, 3, side * cell, side * cell]` and its cells, row by row; `name` is what the first shows.

        `bold` draws them in bolder styles (`restyle.py`); what is called their style is what they were drawn in before.
        """

        def whole(below: int) -> int:
            return int(torch.randint(below, (1,), generator=draws))

        drawn = torch.zeros(side**2, SIDE, SIDE, 4, dtype=torch.uint8)
        cells: list[Cell] = []
        for place in range(side**2):
            colour = whole(len(brush.COLOURS))
            if name is not None and place == 0:
                written, shown = False, name
            else:
                written = float(torch.rand(1, generator=draws)) < self.writing
                shown = self.names[whole(len(self.names))]
                drawings = [one.name for one in cells if not one.text]
                if drawings and float(torch.rand(1, generator=draws)) < _AGAIN:
                    shown, written = drawings[whole(len(drawings))], False
            if written:
                text = str(whole(100)) if whole(2) else self.short[whole(len(self.short))]
                drawn[place, ..., 3] = brush.written(text, self.fonts[whole(len(self.fonts))])
                cells.append(Cell("", "", colour, text))
            else:
                among = self.numbers[shown]
                number = among[whole(len(among))]
                drawn[place] = self.pictures.pixels[number]
                cells.append(Cell(shown, self.pictures.styles[number], colour))
        ink = torch.tensor([bool(one.text) for one in cells])
        papers = torch.tensor([one.colour for one in cells])
        if bold:
            drawn = restyle.restyled(drawn, ink, draws)
        pixels = brush.draw(drawn, ink, papers, cell, vary, draws)
        return brush.arrange(pixels, side) if side > 1 else pixels, cells
