"""`python -m studies eye methods`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from keepsight.cli.common.console import quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError
from studies.eye.options import RESULTS, WORK, Made, Published, Results, Work, conditions_of, opened, report


@with_examples(("PVM with the warm-up, trained behind up to 256 tokens", "python -m studies eye methods pvm-warm"))
def methods_on_eye(
    method: Annotated[str, typer.Argument(help="lora, mlp, pvm or pvm-warm.")],
    longest: Annotated[int, typer.Option(help="Tokens of narration in training: from 0 to so many.", min=0)] = 256,
    seed: Annotated[int, typer.Option(help="Of the method's start and its data.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after so long, with a checkpoint.", min=0.0)] = 60.0,
    size: Made = None,
    eye: Published = None,
    images: Annotated[int, typer.Option(help="Images of each kind in the test.", min=2)] = 96,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads on a CPU.", min=1)] = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Train one method on the frozen eye, then measure how its reading falls with length. Goes on where it was."""
    quiet()
    import torch

    from studies.eye import lengths, narrations
    from studies.eye.comparing import methods
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
    conditions = conditions_of(about, begin, device, threads)
    conditions["trial"] = {**vars(trial), "lr": methods.RATES[method], "train_cpu_seconds": round(stage.cpu_seconds, 1)}
    file = results / "methods" / f"{trial.name}.json"
    report(file, {"conditions": conditions, "rows": rows}, lengths.table(rows))
