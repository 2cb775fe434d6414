"""`python -m studies eye publish|export|data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepsight.cli.common.console import out, quiet, say, with_examples
from keepsight.errors import KeepsightError
from studies.eye.options import RESULTS, WORK, Made, Published, Results, Which, Work, folder_of, opened, size_of


@with_examples(
    ("after the gate, whose figures go into the card", "python -m studies eye publish --to my-eye"),
    ("the card of a published eye again", "python -m studies eye publish --eye my-eye --to my-eye"),
)
def publish_eye(
    to: Annotated[Path | None, typer.Option(help="Folder to write. Default: published/SIZE in --work.")] = None,
    size: Made = None,
    eye: Published = None,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Put the eye and a model card into a folder that others can be given; nothing is sent anywhere."""
    quiet()
    from studies.eye.publishing.eye import about_eye
    from studies.eye.publishing.publish import publish

    folder = folder_of(work, size, eye)
    to = to or work / "published" / about_eye(folder)["size"]
    if not publish(folder, results, to):
        say("the card says that nothing was measured: there is no result of the gate of this very eye. Next:")
        say(f"python -m studies eye gate --eye {to}, then publish again")
    out.print(str(to), highlight=False, markup=False, soft_wrap=True)


@with_examples(
    ("of the eye that `make` left", "python -m studies eye export my-vlm"),
    ("of a published one", "python -m studies eye export my-vlm --eye studies/eye/published/cpu"),
    ("for grids of 2 x 2 pictures", "python -m studies eye export my-vlm --side 2"),
    ("with a memory that `methods` has trained", "python -m studies eye export my-vlm --method pvm-256-0"),
)
def export_eye(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    side: Annotated[
        int, typer.Option(help="Pictures along the side of an image: 1 for a single one, 2 for a grid of four.", min=1)
    ] = 1,
    pictures: Annotated[
        int, typer.Option(help="So many examples in FOLDER/pictures; 0 for none, which needs no drawings.", min=0)
    ] = 8,
    method: Annotated[
        str | None, typer.Option(help="A training of `methods` by its name, to be written into FOLDER/NAME as well.")
    ] = None,
    size: Made = None,
    eye: Published = None,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Write language model and eye as an ordinary Qwen2.5-VL checkpoint, with pictures to ask about.

    Every command of keepsight takes the folder. Each image is brought to the size that the eye knows; crop it to a
    square before.
    """
    quiet()
    from studies.eye import narrations
    from studies.eye.publishing import examples
    from studies.eye.publishing.export import export, export_method, trial_of
    from studies.eye.publishing.publish import CARD, card, gate_of

    _must_be_new(folder)
    of = opened(work, size, eye)
    own, about = of.size, of.about
    if side not in own.sides:
        known = ", ".join(map(str, own.sides))
        raise KeepsightError(f"--side {side}: this eye has seen images of so many pictures along a side: {known}.")
    trained = work / about["size"] / "methods" / about["sha256"][:12] / f"{method}.safetensors"
    if not about["done"]:
        say("the eye is not done: python -m studies eye make goes on with it")
    if method is not None:
        trial_of(trained)  # what is wrong with it is told before half a gigabyte is written
    export(of.model, of.tokenizer, own, side, folder)
    (folder / CARD).write_text(card(about, gate_of(about, results), None), encoding="utf-8")
    if pictures:
        told = results / narrations.FILE
        examples.write(of.pictures, about["packages"], told, own, side, folder / "pictures", pictures)
    if method is not None:
        export_method(of.model, trained, folder, folder / method)
    say(f'keepsight generate {folder / (method or "")} -i PICTURE -p "What is here?"')
    out.print(str(folder), highlight=False, markup=False, soft_wrap=True)


@with_examples(
    ("questions about single drawings", "python -m studies eye data my-data"),
    ("about grids, behind longer texts", "python -m studies eye data my-data --side 2 --longest 2048"),
    (
        "behind texts where much is forgotten",
        "python -m studies eye data my-data --shortest 1024 --longest 2048 --bold 1",
    ),
)
def data_of_eye(
    folder: Annotated[Path, typer.Argument(help="Folder to write.")],
    side: Annotated[
        int, typer.Option(help="Pictures along the side of an image, as with `export`: 1 or 2.", min=1)
    ] = 1,
    longest: Annotated[int, typer.Option(help="Tokens of narration in training, at most.", min=0)] = 256,
    shortest: Annotated[int, typer.Option(help="And at least: far behind the image it is forgotten.", min=0)] = 0,
    bold: Annotated[
        float, typer.Option(help="Share of the images in training drawn in bolder styles.", min=0.0, max=1.0)
    ] = 0.0,
    rows: Annotated[int, typer.Option(help="Questions to train on.", min=1)] = 512,
    images: Annotated[
        int, typer.Option(help="Images to validate with, and to test with, each behind every length.", min=2)
    ] = 48,
    seed: Annotated[int, typer.Option(help="Of training and validation.")] = 0,
    size: Which = "cpu",
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Write questions behind long texts as JSONL and PNG files, for `keepsight train|eval|diagnose` of an exported eye.

    The images are drawn for one size of model: --side and --size as with `export`.
    """
    quiet()
    from keepsight.cli.common.progress import Progress
    from studies.eye import narrations
    from studies.eye.drawings.pictures import pictures
    from studies.eye.language import language_model
    from studies.eye.publishing.data import write

    _must_be_new(folder)
    narrations.check_lengths(longest, shortest)
    chosen = size_of(size)
    if side not in (1, max(number for number in chosen.sides if number <= 2)):
        raise KeepsightError(f"--side {side}: there is a test for single drawings (1) and for grids of 2 x 2 (2).")
    with Progress("the questions") as show:
        _, tokenizer = language_model(work / "packages", work)
        told = narrations.read(results / narrations.FILE, tokenizer)
        drawn = pictures(work / "packages", work)
        written = write(drawn, tokenizer, told, chosen, side, folder, rows, images, longest, seed, show, shortest, bold)
    for name, count in written.items():
        say(f"{count} questions: {folder / name}.jsonl")
    say(f"keepsight data check {folder / 'train.jsonl'}")
    out.print(str(folder), highlight=False, markup=False, soft_wrap=True)


def _must_be_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KeepsightError(f"{folder} is there already, and not empty. Choose another folder, or remove it.")
