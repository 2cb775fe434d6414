"""`keepsight convert`: a checkpoint of the PVM authors' fork becomes a plain base model and an adapter."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from keepsight.cli.common.console import out
from keepsight.cli.common.progress import Progress


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
    with Progress("the conversion") as show:
        made = convert_checkpoint(
            source, target, overwrite=overwrite, progress=lambda task, done, total: show(task, done / total, 1)
        )

    def tell(line: str) -> None:
        out.print(line, markup=False, highlight=False, soft_wrap=True)

    gates = ", ".join(f"{layer}: {gate:+.4g}" for layer, gate in made.gates.items())
    tell(f"Base     {made.base}: {made.base_tensors:,} tensors, {made.base_bytes / 1e9:.2f} GB")
    tell(f"Adapter  {made.adapter}: {made.adapter_parameters:,} parameters, gates {{{gates}}}")
    tell(f"Use it:  keepsight.load({str(made.adapter)!r})")
