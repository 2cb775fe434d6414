"""`keepsight convert`: a checkpoint of the PVM authors' fork becomes a plain base model and an adapter."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder in the PVM authors' layout.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make; gets OUT/base and OUT/adapter.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, the result of an earlier run.")] = False,
) -> None:
    """Take a checkpoint of the PVM authors' Qwen3-VL fork apart.

    OUT/base loads in plain transformers; OUT/adapter is what generate, info and keepsight.load take. Everything is
    checked before anything is written, and OUT appears whole or not at all.
    """
    from keepsight.checkpoints.convert import (
        convert as convert_checkpoint,  # torch and transformers, not needed for --help
    )

    # Asked to end, unwind: what was written so far is removed on the way.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done)  # type: ignore[arg-type]

        made = convert_checkpoint(source, target, overwrite=overwrite, progress=show)
    gates = ", ".join(f"{layer}: {gate:+.4g}" for layer, gate in made.gates.items())
    console.print(
        f"Base     {_plain(str(made.base))}: {made.base_tensors:,} tensors, {made.base_bytes / 1e9:.2f} GB",
        soft_wrap=True,
    )
    console.print(
        f"Adapter  {_plain(str(made.adapter))}: {made.adapter_parameters:,} parameters, gates {{{gates}}}",
        soft_wrap=True,
    )
    console.print(f"Use it:  keepsight.load({str(made.adapter)!r})", markup=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text that rich prints as it is: a path may hold brackets."""
    from rich.markup import escape

    return escape(text)
