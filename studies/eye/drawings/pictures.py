"""The pictures: named drawings in several styles, rendered once into one file of RGBA pixels."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keepsight.errors import KeepsightError
from studies.eye.registries.fetch import checked
from studies.eye.registries.packages import PICTURES, Package

SIDE = 64
"""Pixels along the side of what is kept; the eye sees fewer."""

WORDS = """
airplane alien ambulance anchor apple baby bank baseball bathtub battery bear bicycle book boot boy bread cake candy
car cherries church clock cloud cookie crown desert door dress droplet ear elephant eye fireworks flashlight flower
foot frog ghost girl glasses guitar hammer hand hat heart helicopter hospital jeans key keyboard lock locomotive memo
microphone microscope moon motorcycle mouth nose package panda peach pear pen penguin pig pineapple printer rabbit
radio ribbon ring rocket rose scroll seedling shell shirt shower spider star sun sunrise syringe taxi telescope
television thermometer tomato tractor tram tree trophy violin volcano watch whale window woman wrench
""".split()  # noqa: SIM905
"""What the eye learns to name: what `studies/eye/drawings/choose.py` found to be drawn alike in the training styles."""

_DRAWN_AS = {
    "apple": ("red-apple", "green-apple"),
    "boot": ("womans-boot", "womans-boots"),
    "book": ("open-book", "closed-book", "blue-book", "green-book", "orange-book"),
    "cake": ("shortcake", "birthday-cake"),
    "car": ("automobile", "oncoming-automobile", "sport-utility-vehicle"),
    "cheese": ("cheese-wedge",),
    "clock": ("alarm-clock", "mantelpiece-clock"),
    "diamond": ("gem-stone",),
    "flag": ("triangular-flag", "triangular-flag-on-post"),
    "flower": ("cherry-blossom", "hibiscus", "sunflower"),
    "foot": ("footprints",),
    "hand": ("raised-hand", "hand-with-fingers-splayed"),
    "hat": ("top-hat", "womans-hat"),
    "heart": ("red-heart", "blue-heart", "green-heart", "yellow-heart", "purple-heart", "black-heart"),
    "leaf": ("maple-leaf", "fallen-leaf"),
    "lock": ("locked", "unlocked", "locked-with-key"),
    "moon": ("crescent-moon", "last-quarter-moon"),
    "mug": ("beer-mug",),
    "phone": ("mobile-phone",),
    "piano": ("musical-keyboard",),
    "robot": ("robot",),
    "shell": ("spiral-shell",),
    "shirt": ("t-shirt",),
    "shoe": ("running-shoe", "mans-shoe"),
    "spider": ("spider",),
    "ship": ("ship", "passenger-ship"),
    "sun": ("sun", "sun-with-face"),
    "tree": ("deciduous-tree", "evergreen-tree"),
    "whale": ("spouting-whale", "whale"),
    "wolf": ("wolf", "wolf-face"),
}
_ANOTHER_THING = {
    (name, style)
    for style in ("fa6-solid", "game-icons", "icon-park", "mdi", "ph", "tabler")
    for name in ("apple", "mouse", "ring", "window", "pick", "package", "divide")
}
"""Icons of programs where emoji draw things: a logo, a pointer."""
_NOT_NAMED = ("skin-tone", "flag-", "keycap", "button", "oclock", "thirty", "zodiac", "japanese", "regional")


@dataclass
class Pictures:
    """Drawings, RGBA.

    Args:
        pixels: `[N, 64, 64, 4]`, uint8, colour not multiplied by alpha.
        names: of each drawing, as it is drawn; a concept or any other name.
        styles: of each drawing.
        firsts: whether a drawing is its concept's first (a red apple rather than a green one).
        concepts: the words that the eye learns to name.
        held_out: styles that no training ever sees.
        shapes: sets of icons that the tower alone learns from; about them nothing is asked.
    """

    pixels: torch.Tensor
    names: list[str]
    styles: list[str]
    firsts: list[bool]
    concepts: list[str]
    held_out: list[str]
    shapes: list[str] = field(default_factory=list)

    @property
    def seen(self) -> list[str]:
        """The styles that are learnt and asked about."""
        return sorted(set(self.styles) - {*self.held_out, *self.shapes})

    def of(self, style: str) -> dict[str, int]:
        """Concept -> its first drawing in a style."""
        known = set(self.concepts)
        return {
            name: number
            for number, (name, drawn, first) in enumerate(zip(self.names, self.styles, self.firsts, strict=True))
            if drawn == style and first and name in known
        }

    def save(self, file: Path) -> None:
        """Write everything into one safetensors file."""
        about = {key: json.dumps(value) for key, value in vars(self).items() if key != "pixels"}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": self.pixels}, file, about)

    @classmethod
    def load(cls, file: Path) -> Pictures:
        """Read what `save` wrote."""
        with safe_open(file, "pt") as opened:
            about = {key: json.loads(value) for key, value in opened.metadata().items()}
            return cls(opened.get_tensor("pixels"), **about)


def pictures(packages: Path, cache: Path, on_progress: Callable[[int, int], Any] = lambda done, of: None) -> Pictures:
    """Every drawing of the fetched packages; rendered once (a minute or two), then read from `cache`."""
    file = cache / "pictures.safetensors"
    if not file.is_file():
        made = render(packages, WORDS, on_progress)
        made.save(file)
    return Pictures.load(file)


def things(packages: Path) -> list[str]:
    """Every word that could be learnt: one word, drawn by its own name or by those of `_DRAWN_AS`."""
    named = [name for package in PICTURES if package.use == "train" for name in _icons_of(package, packages).names()]
    elsewhere = {slug for word, slugs in _DRAWN_AS.items() for slug in slugs if slug != word}
    return sorted(name for name in {*_DRAWN_AS, *named} if name.isalpha() and name not in elsewhere)


def render(
    packages: Path, words: list[str], on_progress: Callable[[int, int], Any] = lambda done, of: None
) -> Pictures:
    """Draws those of `words` that five training styles and all test styles have, and what else the former share."""
    sets = {package.style: _icons_of(package, packages) for package in PICTURES}
    train = [package.style for package in PICTURES if package.use == "train"]
    test = [package.style for package in PICTURES if package.use == "test"]
    shapes = [package.style for package in PICTURES if package.use == "shapes"]
    concepts = [
        word
        for word in words
        if sum(_slugs(word)[0] in sets[style] for style in train) >= 5 and all(_slugs(word)[0] in sets[s] for s in test)
    ]
    drawn_by = {slug for word in concepts for slug in _slugs(word)}
    others = sorted(
        name
        for name in sets[train[0]].names()
        if name not in drawn_by
        and not any(part in name for part in _NOT_NAMED)
        and sum(name in sets[style] for style in train) >= 5
    )
    wanted = [(word, slug, style) for word in concepts for slug in _slugs(word) for style in (*train, *test)]
    wanted += [(name, name, style) for name in others for style in train]
    for style in shapes:
        wanted += [(word, slug, style) for word in concepts for slug in {*_slugs(word), word}]
        wanted += [(name, name, style) for name in others]
    wanted = [one for one in wanted if one[1:] not in _ANOTHER_THING]
    found: list[tuple[np.ndarray, str, str, bool]] = []
    for number, (name, slug, style) in enumerate(wanted):
        on_progress(number, len(wanted))
        drawing = sets[style].draw(slug)
        if drawing is not None:
            found.append((drawing, name, style, slug == _slugs(name)[0]))
    return Pictures(
        torch.from_numpy(np.stack([drawing for drawing, *_ in found])),
        [name for _, name, *_ in found],
        [style for _, _, style, _ in found],
        [first for *_, first in found],
        concepts,
        test,
        shapes,
    )


def _icons_of(package: Package, packages: Path) -> _Icons:
    return _Icons(checked(package, packages))


def _slugs(word: str) -> tuple[str, ...]:
    return _DRAWN_AS.get(word, (word,))


class _Icons:
    """One package of Iconify: names -> SVG."""

    def __init__(self, archive: Path):
        with tarfile.open(archive) as opened:
            inner = opened.extractfile("package/icons.json")
            assert inner is not None, archive
            self.data = json.load(inner)
        # one set writes its names without hyphens
        self.plain = {name.replace("-", ""): name for name in (*self.data.get("aliases", {}), *self.data["icons"])}

    def names(self) -> list[str]:
        return [*self.data["icons"], *self.data.get("aliases", {})]

    def __contains__(self, slug: str) -> bool:
        return slug.replace("-", "") in self.plain

    def draw(self, slug: str) -> np.ndarray | None:
        """`[64, 64, 4]` RGBA, or None where there is no such drawing, or one that is nearly empty."""
        try:
            import resvg_py
            from PIL import Image
        except ImportError as error:
            raise KeepsightError(
                f"the pictures need {error.name}, which is not installed: pip install gguf==0.19.0 resvg-py==0.5.0"
            ) from error
        name = self.plain.get(slug.replace("-", ""))
        if name is None:
            return None
        while name in self.data.get("aliases", {}):
            name = self.data["aliases"][name]["parent"]
        icon = self.data["icons"][name]
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
            f'width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        drawn = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
        picture = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGBA").resize((SIDE, SIDE)))
        return picture.copy() if (picture[..., 3] > 64).mean() > 0.02 else None
