"""`python -m studies eye methods|language|adapter`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from keepsight.cli.common.console import out, quiet, say, with_examples
from keepsight.cli.common.progress import Progress
from keepsight.errors import KeepsightError
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


@with_examples(
    ("the eye itself, to compare with", "python -m studies eye methods none"),
    ("PVM with the warm-up, trained behind up to 256 tokens", "python -m studies eye methods pvm-warm"),
    ("all weights, at the target length, another seed", "python -m studies eye methods sft --longest 2048 --seed 1"),
    ("a rate, chosen without the test", "python -m studies eye methods lora --rate 3e-4 --validation --images 32"),
)
def methods_on_eye(
    method: Annotated[str, typer.Argument(help="none, lora, sft, mlp, pvm or pvm-warm.")],
    longest: Annotated[int, typer.Option(help="Tokens of narration in training: from 0 to so many.", min=0)] = 256,
    seed: Annotated[int, typer.Option(help="Of the method's start and its data.")] = 0,
    steps: Annotated[int, typer.Option(help="Of training, of up to 12 questions each.", min=1)] = 120,
    batch_images: Annotated[
        int, typer.Option(help="Images of a step, with 12 // N questions each.", min=1, max=12)
    ] = 2,
    look_up_steps: Annotated[
        int, typer.Option(help="Before that, so many steps of 8 images with no narration: the look-up first.", min=0)
    ] = 0,
    text: Annotated[
        bool, typer.Option("--text", help="Text too: behind an image it is to be expected as without the method.")
    ] = False,
    rate: Annotated[float | None, typer.Option(help="Highest learning rate. Default: the method's own.")] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="To choose settings by: measure on what is neither trained nor tested.")
    ] = False,
    minutes: Annotated[float, typer.Option(help="Stop training after so long, with a checkpoint.", min=0.0)] = 60.0,
    size: Made = None,
    eye: Published = None,
    images: Annotated[int, typer.Option(help="Images of each kind in the test.", min=2)] = 96,
    memory_images: Annotated[
        int, typer.Option(help="Of these, so many with other memories too; four passes each. 0: none.", min=0)
    ] = 24,
    memory_longest: Annotated[int, typer.Option(help="Longest narration with other memories.", min=0)] = 1024,
    device: Device = "cpu",
    threads: Threads = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Train one method on the frozen eye, then measure the language, reading by length and its memory.

    Goes on where it was, in training and between the three measurements; their raw result is written after each.
    """
    quiet()
    from studies.eye import lengths, narrations
    from studies.eye.comparing import methods
    from studies.eye.comparing.measure import measure

    if method not in (methods.NONE, *methods.METHODS):
        known = ", ".join([methods.NONE, *methods.METHODS])
        raise KeepsightError(f"No method is called {method!r}. There are: {known}.")
    narrations.check_lengths(longest)
    until = time.monotonic() + 60 * minutes
    trial = methods.Trial(
        method,
        longest,
        seed,
        steps,
        batch_images,
        look_up_steps=look_up_steps,
        rate=rate,
        text=text,
        validation=validation,
    )
    with Progress(trial.name) as show:
        of = opened(work, size, eye, device, threads)
        told, unheard = trial.narrations(narrations.read(results / narrations.FILE, of.tokenizer))
        trained, spent, sha256 = of.model, 0.0, of.about["sha256"]
        if method != methods.NONE:

            def on_progress(stage: str, step: int, steps: int, loss: float) -> None:
                show(stage, step, steps, f"loss {loss:.2f}")

            trained, stage = methods.train(
                trained,
                of.tokenizer,
                of.pictures,
                of.size,
                told,
                trial,
                work / of.about["size"] / "methods" / sha256[:12],
                lambda: time.monotonic() > until,
                on_progress,
            )
            if not stage.done:
                say(f"{trial.name}: step {stage.step} of {stage.steps}; the same command goes on")
                return
            spent = round(stage.cpu_seconds, 1)
        told_of = {
            **trial.told(),
            "batch_images": batch_images,
            "lr": trial.lr,
            "parameters": methods.learning(trained) if method != methods.NONE else 0,
            "train_cpu_seconds": spent,
            "images": images,
            "memory_images": memory_images,
            "memory_longest": memory_longest,
        }
        file = results / "methods" / f"{trial.name}.json"
        found, seconds = _before(file, told_of, sha256)
        drawn, begin = of.pictures, time.process_time() - seconds

        def keep() -> None:
            report(file, {"conditions": {**of.conditions(begin), "trial": told_of}, **found}, ())

        measure(
            trained,
            of.tokenizer,
            drawn,
            of.size,
            unheard,
            trial,
            found,
            keep,
            images,
            memory_images,
            memory_longest,
            show,
        )
    for line in lengths.table(found["rows"]):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _before(file: Path, trial: dict[str, Any], eye: str) -> tuple[dict[str, Any], float]:
    """What this trial's raw result holds already, and the CPU seconds that it took."""
    if not file.is_file():
        return {}, 0.0
    found = json.loads(file.read_text(encoding="utf-8"))
    conditions = found.pop("conditions")
    same = conditions["trial"] == json.loads(json.dumps(trial)) and conditions["eye"] == eye
    return (found, conditions["cpu_seconds"]) if same else ({}, 0.0)


@with_examples(("before any method", "python -m studies eye language"))
def language_of_eye(
    size: Made = None,
    eye: Published = None,
    device: Device = "cpu",
    threads: Threads = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Measure what the eye left of the language: perplexity of a text and plain questions, against SmolLM2's own."""
    quiet()
    from studies.eye.comparing import kept
    from studies.eye.language import language_model

    of = opened(work, size, eye, device, threads)
    language, _ = language_model(work / "packages", work)
    drawn, begin = of.pictures, time.process_time()
    rows = [kept.measure(language.to(device), of.tokenizer, kept.ORIGINAL, None, of.size)]
    rows += [kept.measure(of.model, of.tokenizer, kept.EYE, shown, of.size) for shown in (None, drawn)]
    file = results / f"language-{of.about['size']}.json"
    report(file, {"conditions": of.conditions(begin), "rows": rows}, kept.table(kept.by_name(rows)))


@with_examples(
    ("after `keepsight train vismem-formation my-vlm ... -o stage1`", "python -m studies eye adapter stage1 --side 2"),
    ("after stage II too: when left to itself", "python -m studies eye adapter stage2 --side 2 --free"),
)
def adapter_on_eye(
    adapter: Annotated[Path, typer.Argument(help="A VisMem that `keepsight train` put on an exported eye.")],
    side: Annotated[int, typer.Option(help="As the eye was exported with: 1 or 2.", min=1)] = 1,
    images: Annotated[int, typer.Option(help="Images of the test.", min=2)] = 24,
    longest: Annotated[int, typer.Option(help="Longest narration.", min=0)] = 1024,
    free: Annotated[bool, typer.Option("--free", help="Also let the model decide when to invoke.")] = False,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the exported eye, if not where the adapter says.")
    ] = None,
    size: Which = "cpu",
    device: Device = "cpu",
    threads: Threads = 1,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Measure a VisMem at the lengths of the test: never, short, long, and with another image's latents.

    The memory stands before the first word of the answer. The decoder sees its own image each time. What the training
    cost is kept beside it.
    """
    quiet()
    import hashlib
    from dataclasses import asdict

    import torch

    import keepsight
    from keepsight.train.run import accounting
    from studies.eye import lengths, narrations
    from studies.eye.comparing import latents
    from studies.eye.comparing.methods import HELD_OUT
    from studies.eye.drawings.pictures import pictures

    torch.set_num_threads(threads)
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise KeepsightError(f"{weights} is not there. Train one: keepsight train vismem-formation (docs/eye.md).")
    with Progress("the adapter") as show:
        model, processor = keepsight.load(adapter, device=device, base=base)
        told = narrations.read(results / narrations.FILE, processor.tokenizer)[-HELD_OUT:]
        these = latents.tested(pictures(work / "packages", work), size_of(size), side, images)
        asked_at, begin = [one for one in lengths.LENGTHS if one <= longest], time.process_time()
        rows = latents.measure(model.eval(), processor, these, told, asked_at, free, show)
    conditions = {
        "adapter": adapter.name,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "side": side,
        "images": images,
        "size": size,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "device": device,
        "threads": threads,
    }
    if (adapter / accounting.FILE).is_file():
        conditions["training"] = asdict(accounting.RunCost.read(adapter))
    report(results / "adapters" / f"{adapter.name}.json", {"conditions": conditions, "rows": rows}, latents.table(rows))
