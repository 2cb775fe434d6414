"""`keepsight lab`: make the small reference VLM."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from keepsight.cli.common.console import Interrupted, out, quiet, with_examples
from keepsight.cli.common.options import Command
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError

lab_app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_STAGES = {
    "align": "1/3 visual tokens learn to mean digits and cells",
    "dense": "2/3 facts without filler",
    "short": "3/3 short narrations, positions jumping",
}


@lab_app.callback()
def _lab() -> None:
    """Make the small reference VLM that the demo runs on."""


@with_examples(
    ("the base that ships with keepsight, from nothing", "keepsight lab pretrain -o my-base"),
    ("another base, and the demo on it", "keepsight lab pretrain --seed 1 --output-dir base-1"),
    ("", "keepsight demo --base base-1"),
    (
        "a base that has seen short positions only: its fall is mostly rotary range",
        "keepsight lab pretrain --max-jump 0 -o short",
    ),
)
def pretrain(
    folder: Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the checkpoint.")] = Path(
        "keepsight-base"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and data; the same seed gives the same bits.", min=0)] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the last stage. Default: the shipped base's.", min=0)
    ] = None,
    max_jump: Annotated[
        int | None,
        typer.Option(help="Largest random jump of the positions; 0: none. Default: the shipped base's.", min=0),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a base that is already in the folder.")
    ] = False,
) -> None:
    """Pretrain the reference VLM from nothing on handwritten digits: a minute or two on one core.

    Writes an ordinary checkpoint folder (config, processor, tokenizer, 16-bit safetensors) which transformers'
    AutoModelForImageTextToText and AutoProcessor load.
    """
    quiet()
    from dataclasses import replace

    from keepsight.checkpoints.atomic import new_folder
    from keepsight.lab.digits import load_glyphs
    from keepsight.lab.pretraining import PRETRAINING_RECORD, PretrainConfig
    from keepsight.lab.pretraining import pretrain as run

    load_glyphs()  # a missing extra is found before the work
    if folder.exists() and not folder.is_dir():
        raise KeepsightError(f"{folder} is a file; -o needs a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / PRETRAINING_RECORD).is_file():
            raise KeepsightError(f"{folder} is not empty and holds no base made here. Choose another folder: -o DIR")
        if not overwrite:
            raise KeepsightError(f"{folder} holds a base already. Choose another folder, or replace it: --overwrite")
    config = PretrainConfig(seed=seed)
    if steps is not None:
        config = replace(config, short_steps=steps)
    if max_jump is not None:
        config = replace(config, max_jump=max_jump)
    begin = time.perf_counter()
    try:
        with new_folder(folder) as fresh, Progress("pretraining", announce=True) as show:
            record = run(fresh, config, lambda stage, done, total: show(_STAGES[stage], done, total))
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped by Ctrl-C; nothing was written.") from stop
    except PermissionError as error:
        raise KeepsightError(f"{folder} cannot be written. Choose another folder: -o DIR") from error
    out.print(
        f"{folder}: reads {record['short_accuracy']:.1%} of unseen validation digits in short outputs; "
        f"{time.perf_counter() - begin:.0f} s",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    out.print(f"The demo on it: keepsight demo --base {folder}", highlight=False, markup=False, soft_wrap=True)


lab_app.command("pretrain", cls=Command)(pretrain)
