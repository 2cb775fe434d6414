"""What the eye's commands share: options, the conditions of a measurement, and where its raw result goes."""

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
from studies.eye.sizes import SIZES, Size

Work = Annotated[Path, typer.Option(help="Folder for what is fetched and made.")]
Which = Annotated[str, typer.Option(help=f"How large an eye: {', '.join(SIZES)}.")]
WORK = Path("keepsight-eye")
RESULTS = Path("studies/results/eye")


def size_of(name: str) -> Size:
    """The size that is called so."""
    if name not in SIZES:
        raise KeepsightError(f"No size is called {name!r}. There are: {', '.join(SIZES)}.")
    return SIZES[name]


def conditions_of(
    name: str, size: Size, about: dict[str, Any], begin: float, device: str, threads: int
) -> dict[str, Any]:
    """Of a measurement that began at `begin` in CPU seconds, as plain JSON."""
    import torch
    import transformers

    return {
        "size": name,
        "settings": size.settings(),
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
