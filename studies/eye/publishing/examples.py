"""Something to ask an exported model about: drawings as PNG files, a long text, and where both come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from studies.eye.drawings.pictures import Pictures
from studies.eye.drawings.scenes import Scenes
from studies.eye.making.stages import generator
from studies.eye.questions import place
from studies.eye.sizes import Size

FREE = ("Apache-2.0", "MIT", "CC-BY-3.0", "CC-BY-4.0")
"""Licences of pictures that may be handed on with their author's name; share-alike ones are not among them."""
SAID = "said.txt"
"""A text to stand between image and question."""
_TURNS = 8
"""Answers in it: about 2,300 tokens, of narrations that no method is trained behind."""


def write(
    pictures: Pictures,
    packages: list[dict[str, Any]],
    narrations: Path,
    size: Size,
    side: int,
    folder: Path,
    count: int,
) -> None:
    """Write `count` images, a text and a README into `folder`: a thing each, or grids of them.

    Args:
        pictures: all drawings.
        packages: what the eye was made from (`about_eye`).
        narrations: the file of the narrations; where there is none, no text is written.
        size: of the eye.
        side: pictures along the side of an image.
        folder: made where it is not there.
        count: how many images.
    """
    from PIL import Image

    free = {
        package["name"].rpartition("/")[2]: package
        for package in packages
        if package["use"] == "train" and package["licence"] in FREE
    }
    styles = [style for style in pictures.seen if style in free]
    folder.mkdir(parents=True, exist_ok=True)
    told = [
        "# Pictures to ask about",
        "Drawn as the gate draws: rendered, reduced and put on coloured paper. None of them was left out or chosen for "
        "what the model says of it. The drawings are other people's, under the licences below.",
        "",
        "| file | shows | drawn by | licence |",
        "|---|---|---|---|",
    ]
    names = Scenes(pictures, styles, firsts=True).names
    for number in range(count if styles else 0):
        style = styles[number % len(styles)]
        scenes, draws = Scenes(pictures, [style], firsts=True), generator(size.seed, 8, side, number)
        name = names[number * len(names) // count]
        image, cells = scenes.image(side, size.cell, 0.0, draws, name if name in scenes.names else None)
        shows = [cell.text or cell.name for cell in cells]
        file = f"{shows[0] if side == 1 else f'grid-{number}'}-{style}.png"
        Image.fromarray((255 * image[0]).round().byte().permute(1, 2, 0).numpy()).save(folder / file)
        where = [f"{place(at, side)}: {one}" if side > 1 else one for at, one in enumerate(shows)]
        package = free[style]
        by = f"[{package['author']}]({package['source']})"
        told.append(f"| {file} | {'; '.join(where)} | {by} | {package['licence']} |")
    if narrations.is_file():
        turns = json.loads(narrations.read_text(encoding="utf-8"))["turns"][-_TURNS:]
        (folder / SAID).write_text("\n\n".join(answer for _, answer in turns) + "\n", encoding="utf-8")
        told += ["", f"`{SAID}`: the last {len(turns)} answers of the narrations, which SmolLM2-135M-Instruct wrote."]
    (folder / "README.md").write_text("\n".join([*told, ""]), encoding="utf-8")
