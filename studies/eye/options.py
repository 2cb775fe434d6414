"""What the eye's commands share: options, the eye they ask for, a measurement's conditions, and its raw result."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keepsight.cli.common.console import out
from keepsight.errors import KeepsightError
from studies.eye.sizes import PUBLISHED, SIZES, Size

if TYPE_CHECKING:
    from studies.eye.drawings.pictures import Pictures

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


@dataclass
class Opened:
    """An eye in its language model, as a command measures it.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: of the language model.
        size: of the eye.
        about: what is known of it.
        work: folder of the fetched packages.
        device: where the model is.
        threads: on a CPU.
    """

    model: Any
    tokenizer: Any
    size: Size
    about: dict[str, Any]
    work: Path
    device: str
    threads: int

    @cached_property
    def pictures(self) -> Pictures:
        """All drawings."""
        from studies.eye.drawings.pictures import pictures

        return pictures(self.work / "packages", self.work)

    def conditions(self, begin: float) -> dict[str, Any]:
        """Of a measurement that began at `begin` in CPU seconds, as plain JSON."""
        import torch
        import transformers

        return {
            "size": self.about["size"],
            "eye": self.about["sha256"],
            "settings": self.about["settings"],
            "done": self.about["done"],
            "make_cpu_seconds": self.about["cpu_seconds"],
            "cpu_seconds": round(time.process_time() - begin, 1),
            "device": self.device,
            "threads": self.threads,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }


def opened(work: Path, size: str | None, eye: Path | None, device: str = "cpu", threads: int = 1) -> Opened:
    """The eye that was asked for, ready to be measured."""
    import torch

    from studies.eye.language import language_model
    from studies.eye.publishing.eye import about_eye, made_model

    torch.set_num_threads(threads)
    folder = folder_of(work, size, eye)
    wanted = size_of(size or "cpu") if eye is None else None
    about_eye(folder)  # a missing eye is found before the language model is unpacked
    language, tokenizer = language_model(work / "packages", work)
    model, own, about = made_model(language, tokenizer, folder, wanted)
    return Opened(model.to(device).eval(), tokenizer, own, about, work, device, threads)


def report(file: Path, found: dict[str, Any], lines: Iterable[str]) -> None:
    """Write a raw result, and show what it comes to and where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in (*lines, str(file)):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
