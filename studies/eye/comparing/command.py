"""`python -m studies eye methods|language`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError
from studies.eye.options import RESULTS, WORK, Made, Published, Results, Work, conditions_of, opened, report


@with_examples(
    ("PVM with the warm-up, trained behind up to 256 tokens", "python -m studies eye methods pvm-warm"),
    ("all weights, at the target length, another seed", "python -m studies eye methods sft --longest 2048 --seed 1"),
)
def methods_on_eye(
    method: Annotated[str, typer.Argument(help="lora, sft, mlp, pvm or pvm-warm.")],
    longest: Annotated[int, typer.Option(help="Tokens of narration in training: from 0 to so many.", min=0)] = 256,
    seed: Annotated[int, typer.Option(help="Of the method's start and its data.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop training after so long, with a checkpoint.", min=0.0)] = 60.0,
    size: Made = None,
    eye: Published = None,
    images: Annotated[int, typer.Option(help="Images of each kind in the test.", min=2)] = 96,
    memory_images: Annotated[
        int, typer.Option(help="Of these, so many with other memories too; four passes each. 0: none.", min=0)
    ] = 24,
    memory_longest: Annotated[int, typer.Option(help="Longest narration with other memories.", min=0)] = 1024,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Train one method on the frozen eye, then measure it: reading, its memory, the language. Goes on where it was.

    The raw result is written after each of the three measurements, the quickest first.
    """
    quiet()
    import torch

    from studies.eye import lengths, narrations
    from studies.eye.comparing import kept, memories, methods
    from studies.eye.drawings.pictures import pictures

    if method not in methods.METHODS:
        raise KeepsightError(f"No method is called {method!r}. There are: {', '.join(methods.METHODS)}.")
    until = time.monotonic() + 60 * minutes
    trial = methods.Trial(method, longest, seed)
    torch.set_num_threads(threads)
    with Progress(trial.name) as show:
        model, tokenizer, chosen, about = opened(work, size, eye)
        told = narrations.read(results / narrations.FILE, tokenizer)
        drawn = pictures(work / "packages", work)

        def on_progress(stage: str, step: int, steps: int, loss: float) -> None:
            show(stage, step, steps, f"loss {loss:.2f}")

        def on_measured(what: str, done: int, of: int) -> None:
            show(what, done, of)

        trained, stage = methods.train(
            model.to(device),
            tokenizer,
            drawn,
            chosen,
            told[: -methods.HELD_OUT],
            trial,
            work / about["size"] / "methods" / about["sha256"][:12],
            lambda: time.monotonic() > until,
            on_progress,
        )
        if not stage.done:
            say(f"{trial.name}: step {stage.step} of {stage.steps}; the same command goes on")
            return
        begin, unheard = time.process_time(), told[-methods.HELD_OUT :]
        about_trial = {
            **vars(trial),
            "lr": methods.RATES[method],
            "parameters": methods.learning(trained),
            "train_cpu_seconds": round(stage.cpu_seconds, 1),
        }
        reader = methods.bare(trained).eval()
        found: dict[str, Any] = {}

        def keep(lines: Iterable[str] = ()) -> None:
            conditions = conditions_of(about, begin, device, threads)
            file = results / "methods" / f"{trial.name}.json"
            report(file, {"conditions": {**conditions, "trial": about_trial}, **found}, lines)

        found["language"] = [kept.measure(reader, tokenizer, trial.name, shown, chosen) for shown in (None, drawn)]
        keep()
        found["rows"] = lengths.measure(
            reader, tokenizer, drawn, chosen, unheard, images, ("base", "hidden"), on_measured
        )
        keep()
        if memory_images and method.startswith("pvm"):
            found["memories"] = memories.measure(
                reader,
                trained.disable_adapter,
                tokenizer,
                drawn,
                chosen,
                unheard,
                memory_images,
                memory_longest,
                on_measured,
            )
        keep(lengths.table(found["rows"]))


@with_examples(("before any method", "python -m studies eye language"))
def language_of_eye(
    size: Made = None,
    eye: Published = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Measure what the eye left of the language: perplexity of a text and plain questions, against SmolLM2's own."""
    quiet()
    import torch

    from studies.eye.comparing import kept
    from studies.eye.drawings.pictures import pictures
    from studies.eye.language import language_model

    torch.set_num_threads(threads)
    model, tokenizer, chosen, about = opened(work, size, eye)
    language, _ = language_model(work / "packages", work)
    drawn = pictures(work / "packages", work)
    model, begin = model.to(device).eval(), time.process_time()
    rows = [kept.measure(language.to(device), tokenizer, kept.ORIGINAL, None, chosen)]
    rows += [kept.measure(model, tokenizer, kept.EYE, shown, chosen) for shown in (None, drawn)]
    conditions = conditions_of(about, begin, device, threads)
    report(results / f"language-{about['size']}.json", {"conditions": conditions, "rows": rows}, kept.table(rows))
