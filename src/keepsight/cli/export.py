"""`keepsight export vllm`: a PVM adapter and its base become a folder that vLLM serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepsight.cli.common.console import out, warn, with_examples
from keepsight.cli.common.options import Command

export_app = typer.Typer(
    add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True
)


@export_app.callback()
def _export() -> None:
    """Make a folder that another engine serves."""


@export_app.command("vllm", cls=Command)
@with_examples(
    (
        "a folder that stock vLLM serves; the base's weights are linked, not copied",
        "keepsight export vllm my-memory out",
    ),
    ("where vLLM and keepsight are installed", "vllm serve out"),
)
def export_vllm(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A PVM adapter: a folder, or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The base model, where the recorded one is somewhere else.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA to be served beside it: checked, and named in the commands printed."),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the base's weights instead of linking to them.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, an earlier export.")] = False,
    allow_noncausal: Annotated[
        bool,
        typer.Option(
            "--allow-noncausal",
            help="Serve a memory of the published rule by the causal rule; its answers change.",
        ),
    ] = False,
) -> None:
    """Make a folder that vLLM serves, from a PVM adapter and its base.

    Everything is checked before anything is written, and OUT appears whole or not at all.
    """
    from keepsight.cli.common.console import quiet
    from keepsight.serve.vllm.check import why_not
    from keepsight.serve.vllm.export import export_vllm as make

    quiet()
    made = make(
        adapter,
        target,
        more=lora or (),
        base=base,
        weights="copy" if copy else "link",
        overwrite=overwrite,
        allow_noncausal=allow_noncausal,
    )

    def tell(line: str) -> None:
        out.print(line, markup=False, highlight=False, soft_wrap=True)

    how = "linked: keep the base where it is" if made.linked else "copied"
    tell(f"Base     {made.family}, {made.base_bytes / 1e9:.2f} GB ({how})")
    tell(f"Memory   {made.memory_bytes / 1e6:.2f} MB, architecture {made.architecture}")
    loras = "".join(f" {path.name}={path}" for path in made.loras)
    beside = f" --enable-lora --lora-modules{loras}" if loras else ""
    tell(f"Serve    vllm serve {made.folder}{beside}")
    reason = why_not()
    if reason:
        warn(f"the folder is whole, but cannot be served from this environment. {reason}")
