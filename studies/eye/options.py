"""What the eye's commands share: options, the eye they ask for, a measurement's conditions, and its raw result."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import out
from keepsight.errors import KeepsightError
from studies.eye.sizes import PUBLISHED, SIZES, Size

Work = Annotated[Path, typer.Option(help="Folder for what is fetched and made.")]
Which = Annotated[str, typer.Option(help=f"How large an eye: {', '.join(SIZES)}.")]
Made = Annotated[str | None, typer.Option("--size", help="Which of the eyes that `make` left. Default: cpu.")]
Published = Annotated[
    Path | None, typer.Option("--eye", help=f"Folder of a published eye to take instead, such as {PUBLISHED}.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int, typer.Option(help="Threads on a CPU.", min=1)]
Results = Annotated[Path, typer.Option(help="Folder of the raw results.")]
WORK = Path("keepsight-eye")
RESULTS = Path("studies/results/eye")


def size_of(name: str) -> Size:
    """The size that is called so."""
    if name not in SIZES:
        raise KeepsightError(f"No size is called {name!r}. There are: {', '.join(SIZES)}.")
    return SIZES[name]


def folder_of(work: Path, size: str | None, eye: Path | None) -> Path:
    """Where the eye that was asked for lies: a published one, or the one that `make` left."""
    if eye is not None and size is not None:
        raise KeepsightError("--eye and --size are both given; a published eye says of what size it is.")
    return work / (size or "cpu") if eye is None else eye


def opened(work: Path, size: str | None, eye: Path | None) -> tuple[Any, Any, Size, dict[str, Any]]:
    """The model with the eye that was asked for, its tokenizer, the eye's size and what is known of it."""
    from studies.eye.language import language_model
    from studies.eye.publishing.eye import about_eye, made_model

    folder = folder_of(work, size, eye)
    wanted = size_of(size or "cpu") if eye is None else None
    about_eye(folder)  # a missing eye is found before the language model is unpacked
    language, tokenizer = language_model(work / "packages", work)
    model, own, about = made_model(language, tokenizer, folder, wanted)
    return model, tokenizer, own, about


def conditions_of(about: dict[str, Any], begin: float, device: str, threads: int) -> dict[str, Any]:
    """Of a measurement of the eye `about` that began at `begin` in CPU seconds, as plain JSON."""
    import torch
    import transformers

    return {
        "size": about["size"],
        "eye": about["sha256"],
        "settings": about["settings"],
        "done": about["done"],
        "make_cpu_seconds": about["cpu_seconds"],
        "cpu_seconds": round(time.process_time() - begin, 1),
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def report(file: Path, found: dict[str, Any], lines: Iterable[str]) -> None:
    """Write a raw result, and show what it comes to and where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in (*lines, str(file)):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
