"""Stage (a): the tower alone learns to say what it sees in the language model's word embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from studies.eye.drawings import brush, restyle
from studies.eye.drawings.pictures import SIDE, Pictures
from studies.eye.making.stages import generator
from studies.eye.questions import place
from studies.eye.sizes import Size

_WRITING = 0.15
"""Share of the cells that hold writing."""
_EACH = 1.0
"""Weight of what every single token of a picture is to be, besides their average."""
_PLACE, _COLOUR = 0.7, 0.35
"""Shares of the words for a picture's place and for its paper in what every token is to be; its name has 1."""
_WHITE = 0.2
"""Share of the cells on white paper, besides those that draw it."""
_SHAPES = 0.25
"""Share of the drawings of names to learn that are icons."""


class Pretraining(nn.Module):
    """The tower with heads that are thrown away.

    The average of a picture's tokens is compared, by cosine, with the embeddings of all names; linear heads tell
    colour of the paper, drawing style, place in a grid, and the digits of a written number.

    Args:
        tower: Qwen2.5-VL's.
        pictures: all drawings.
        words: `[names, D]`, the embedding of every name in `names`.
        names: concepts first, then all others that are drawn.
        size: of the eye.
        said: embeddings of phrases (`places` and the papers' colours): `[phrases] -> [phrases, D]`.
    """

    mean: torch.Tensor
    words: torch.Tensor
    colours: torch.Tensor
    length: torch.Tensor

    def __init__(
        self,
        tower: nn.Module,
        pictures: Pictures,
        words: torch.Tensor,
        names: list[str],
        size: Size,
        said: Callable[[list[str]], torch.Tensor],
    ):
        super().__init__()
        self.tower, self.size, self.pictures = tower, size, pictures
        self.names = {name: number for number, name in enumerate(names)}
        self.short = [word for word in pictures.concepts if len(word) <= 5]
        self.register_buffer("mean", words.mean(0), persistent=False)
        self.register_buffer("words", F.normalize(words - words.mean(0), dim=-1), persistent=False)
        self.register_buffer("length", words.norm(dim=-1).mean(), persistent=False)
        self.register_buffer("colours", F.normalize(said(list(brush.COLOURS)) - self.mean, dim=-1), persistent=False)
        for side in (one for one in size.sides if one > 1):
            phrases = said([place(number, side) for number in range(side**2)])
            self.register_buffer(f"places{side}", F.normalize(phrases - self.mean, dim=-1), persistent=False)
        self.styles = pictures.seen
        known = set(pictures.concepts)
        shown = [number for number, style in enumerate(pictures.styles) if style not in pictures.held_out]
        self.known = [n for n in shown if pictures.names[n] in known and pictures.styles[n] in self.styles]
        self.icons = [n for n in shown if pictures.names[n] in known and pictures.styles[n] in pictures.shapes]
        self.others = [n for n in shown if pictures.names[n] not in known] if size.others else []
        sides = max(size.sides)
        wide = words.shape[1]
        self.scale = nn.Parameter(torch.tensor(2.7))
        outputs = {"colour": len(brush.COLOURS), "style": len(self.styles) + 1, "row": sides, "column": sides}
        outputs |= {"tens": 10, "ones": 10}
        self.heads = nn.ModuleDict({name: nn.Linear(wide, count) for name, count in outputs.items()})

    def cells(self, images: torch.Tensor, side: int) -> torch.Tensor:
        """`[B, 3, S, S]` -> `[B * side * side, D]`, the average token of every picture."""
        return average_tokens(self.tower, images, side, self.size)

    def batch(self, step: int, bold: bool = False) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """Images, pictures along their side, and what each picture is; drawn anew from the step's number.

        `bold` draws most of them in a style of their own; these steps follow the others.
        """
        size, draws = self.size, generator(self.size.seed, 4 if bold else 1, step)
        side = size.sides[step % len(size.sides)]
        count = size.pretrain_batch // side**2 * side**2
        # from the names alone, drawn plainly, to all that is drawn, and varied: else it learns colours and nothing more
        vary = 1.0 if bold else min(1.0, 2 * step / size.pretrain_steps)
        drawn, targets = self.sample(count, draws, vary)
        if bold:
            drawn = restyle.restyled(drawn, targets["ink"], draws)
        cells = brush.draw(drawn, targets["ink"], targets["colour"], size.cell, vary, draws)
        if side > 1:
            place = torch.arange(count) % side**2
            targets |= {"row": place // side, "column": place % side}
        return brush.arrange(cells, side) if side > 1 else cells, side, targets

    def loss(self, batch: tuple[torch.Tensor, int, dict[str, torch.Tensor]]) -> torch.Tensor:
        """Of one batch."""
        images, side, targets = batch
        device = self.scale.device
        tokens = picture_tokens(self.tower, images.to(device), side, self.size)
        found = tokens.mean(1)
        targets = {key: value.to(device) for key, value in targets.items()}
        named = targets["name"] >= 0
        cosine = F.normalize(found - self.mean, dim=-1) @ self.words.T
        right = targets["name"][named]
        total = F.cross_entropy(cosine[named] * self.scale.exp(), right, label_smoothing=0.1)
        total = total + 0.1 * (tokens.norm(dim=-1) / self.length - 1).pow(2).mean()
        # each token by itself is close to words that the language model knows, so that there is little left to learn
        said = self.words[right] + _COLOUR * self.colours[targets["colour"][named]]
        if side > 1:
            where = torch.arange(len(found), device=device) % side**2
            said = said + _PLACE * self.get_buffer(f"places{side}")[where[named]]
        each = F.normalize(tokens[named] - self.mean, dim=-1) * F.normalize(said, dim=-1)[:, None]
        total = total + _EACH * (1 - each.sum(-1)).mean()
        close = F.normalize(tokens[named] - self.mean, dim=-1) @ self.words.T * self.scale.exp()
        total = total + _EACH * F.cross_entropy(close.transpose(1, 2), right[:, None].expand(close.shape[:2]))
        for name, head in self.heads.items():
            if name in targets and bool((targets[name] >= 0).any()):
                logits = head(found / self.length)
                total = total + 0.3 * F.cross_entropy(logits, targets[name], ignore_index=-1)
        return total

    def sample(
        self, count: int, draws: torch.Generator, vary: float = 1.0
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Drawings `[count, 64, 64, 4]` and what they are: -1 where a head has nothing to say.

        `vary` is how much of the other things and of the icons is among them: from none (0) to their share (1).
        """

        def whole(below: int) -> int:
            return int(torch.randint(below, (1,), generator=draws))

        drawn = torch.zeros(count, SIDE, SIDE, 4, dtype=torch.uint8)
        keys = ("name", "style", "tens", "ones")
        targets = {key: torch.full((count,), -1) for key in keys}
        targets["colour"] = torch.randint(len(brush.COLOURS), (count,), generator=draws)
        targets["colour"][torch.rand(count, generator=draws) < _WHITE] = 0
        targets["ink"] = torch.rand(count, generator=draws) < _WRITING
        other = torch.rand(count, generator=draws) < self.size.others * vary
        icon = torch.rand(count, generator=draws) < _SHAPES * vary
        for at in range(count):
            if targets["ink"][at]:
                targets["style"][at] = len(self.styles)
                if whole(2):
                    number = whole(100)
                    text = str(number)
                    targets["tens"][at], targets["ones"][at] = number // 10, number % 10
                else:
                    text = self.short[whole(len(self.short))]
                    targets["name"][at] = self.names[text]
                drawn[at, ..., 3] = brush.written(text, brush.FONTS[whole(len(brush.FONTS))])
            else:
                among = (
                    self.others if other[at] and self.others else self.icons if icon[at] and self.icons else self.known
                )
                number = among[whole(len(among))]
                drawn[at] = self.pictures.pixels[number]
                targets["name"][at] = self.names[self.pictures.names[number]]
                if self.pictures.styles[number] in self.styles:
                    targets["style"][at] = self.styles.index(self.pictures.styles[number])
                elif not drawn[at, ..., :3].any():  # all black: any colour that its paper is not
                    drawn[at, ..., :3] = brush.another_colour(int(targets["colour"][at]), draws)
        return drawn, targets

    @torch.no_grad()
    def scores(self, drawings: list[int], papers: torch.Tensor, vary: float, draws: torch.Generator) -> torch.Tensor:
        """`[N, concepts]`: how near the average token of each drawing, on its paper, is to every concept."""
        plain = torch.zeros(len(drawings), dtype=torch.bool)
        cells = brush.draw(self.pictures.pixels[drawings], plain, papers, self.size.cell, vary, draws)
        found = F.normalize(self.cells(cells.to(self.scale.device), 1) - self.mean, dim=-1)
        return (found @ self.words[: len(self.pictures.concepts)].T * self.scale.exp()).cpu()


def picture_tokens(tower: Any, images: torch.Tensor, side: int, size: Size) -> torch.Tensor:
    """`[B, 3, S, S]` -> `[B * side * side, tokens, D]`, the tokens of every picture, pictures row by row."""
    rows, grids = brush.patches(images, size.patch, size.merge)
    dtype = size.computing(images.device.type)
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        tokens = tower(rows, grid_thw=grids.to(images.device)).pooler_output
    along = size.tokens
    laid = tokens.float().view(len(images), side, along, side, along, -1).transpose(2, 3)
    return laid.reshape(len(images) * side**2, along**2, -1)


def average_tokens(tower: Any, images: torch.Tensor, side: int, size: Size) -> torch.Tensor:
    """`[B, 3, S, S]` -> `[B * side * side, D]`, the average token of every picture, row by row."""
    return picture_tokens(tower, images, side, size).mean(1)
