"""`python -m studies run`, `list` and `eye`: the papers' claims, asked again in small."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import Interrupted, debugging, error_border, fail, out, quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError
from studies.eye.command import app as eye

_RAW = Path("studies/results")
_PAGE = Path("docs/evidence.md")
_ELSEWHERE = Path("keepsight-evidence")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(eye, name="eye")


@app.callback()
def _studies() -> None:
    """The evidence: the papers' claims and our own, asked again in small."""


def _defaults(results: Path | None, page: Path | None) -> tuple[Path, Path]:
    """In a clone, the committed results and page; elsewhere a folder of its own."""
    clone = Path("studies/study.py").is_file() and _PAGE.parent.is_dir()
    return (
        results or (_RAW if clone else _ELSEWHERE / "results"),
        page or (_PAGE if clone else _ELSEWHERE / "evidence.md"),
    )


@app.command("run")
@with_examples(
    ("whatever is missing, then the report; stop it at will, it goes on where it was", "python -m studies run"),
    ("the studies of PVM, three seeds, two processes", "python -m studies run pvm --seeds 3 --workers 2"),
    ("only the report, from the results that are there", "python -m studies run --render"),
)
def run(
    study: Annotated[
        list[str] | None, typer.Argument(help="Names of studies, or beginnings of names. Default: all.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Only the first so many seeds of each row.", min=1)] = None,
    workers: Annotated[int, typer.Option(help="Processes, of one thread each.", min=1)] = 1,
    again: Annotated[bool, typer.Option("--again", help="Also run cells that are finished.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Run nothing; write the report.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the raw results. Default: in a clone, the committed ones.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The report; plots go to images/ beside it. Default: docs/evidence.md."),
    ] = None,
    work: Annotated[Path, typer.Option(help="Folder for what can be made again, such as pretrained bases.")] = Path(
        "keepsight-lab"
    ),
) -> None:
    """Ask the papers' claims again in small: studies over five seeds, on the CPU, then a report with verdicts.

    Writes one small JSON per finished cell (one row of a table with one seed). A cell that is there is not run again,
    so the command can be killed at any time. The report is made from these files alone.
    """
    quiet()
    from keepsight.lab.digits import load_glyphs
    from keepsight.lab.study.runs import cells_to_run, run_cells
    from studies.evidence import render as write_page
    from studies.study import all_studies, choose

    load_glyphs()  # a missing extra is found before the work
    folder, page = _defaults(results, page)
    chosen = choose(study)
    for place in (folder, page.parent, work):
        _check_folder(place)
    failed: list[str] = []
    if not render:
        todo = cells_to_run(chosen, folder, work, seeds=seeds, again=again)
        say(f"{len(todo)} cells to run in {len(chosen)} studies; results go to {folder}")
        begin = time.perf_counter()
        try:
            with Progress("studies") as show:
                finished = 0

                def on_done(cell: Any, result: Any) -> None:
                    nonlocal finished
                    finished += 1
                    if isinstance(result, Exception):
                        failed.append(cell.name)
                        fail(f"{cell.name} failed: {traceback.format_exception_only(result)[-1].strip()}")
                        if debugging():
                            say("".join(traceback.format_exception(result)))
                    else:
                        say(f"{cell.name}: {result['wall_seconds']:.0f} s")
                    show("cells", finished, len(todo))

                def on_progress(cell: Any, what: str, share: float) -> None:
                    show("cells", finished, len(todo), f"{cell.name}: {what} {share:.0%}")

                run_cells(todo, workers, on_done, on_progress)
        except KeyboardInterrupt as stop:
            raise Interrupted("stopped by Ctrl-C; finished cells are kept, the same command goes on.") from stop
        say(f"{len(todo) - len(failed)} cells run in {time.perf_counter() - begin:.0f} s")
    raw = Path(os.path.relpath(folder, page.parent)).as_posix()
    for entry in write_page(all_studies(), folder, page, raw):
        if entry.study in chosen:
            out.print(
                f"{entry.verdict.word}: {entry.claim.text} [{entry.study.name}]",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    out.print(f"{page}", highlight=False, markup=False, soft_wrap=True)
    if failed:
        raise KeepsightError(f"{len(failed)} cells failed: {', '.join(failed)}. The others are kept.")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise KeepsightError(f"{folder} is a file, and a folder is needed there.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KeepsightError(f"{folder} cannot be written ({error.strerror}). Choose another place.") from error


@app.command("list")
def list_studies(
    results: Annotated[
        Path | None, typer.Option(help="Folder of the raw results. Default: in a clone, the committed ones.")
    ] = None,
) -> None:
    """The studies: their names, how many of their cells have been run, and what they ask."""
    quiet()
    from rich.table import Table

    from keepsight.lab.study.runs import cell_file, read_cell
    from studies.study import all_studies

    folder, _ = _defaults(results, None)
    table = Table(box=None, pad_edge=False)
    for heading in ("study", "cells", "CPU min", "asks"):
        table.add_column(heading, no_wrap=heading != "asks")
    for name, study in all_studies().items():
        cells = study.cells()
        found = [read_cell(cell_file(folder, name, row.name, seed), study.settings_of(row)) for row, seed in cells]
        done = [record for record in found if record is not None]
        seconds = sum(record["cpu_seconds"] for record in done)
        table.add_row(name, f"{len(done)}/{len(cells)}", f"{seconds / 60:.0f}" if done else "", study.title)
    out.print(table)


def main() -> None:
    """Entry point of `python -m studies`; `--debug` shows tracebacks."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(words) < len(sys.argv) - 1
    if debug:
        os.environ["KEEPSIGHT_DEBUG"] = "1"
    with error_border(debug, extra="lab"):
        raise SystemExit(app(words, "python -m studies"))


if __name__ == "__main__":
    main()
