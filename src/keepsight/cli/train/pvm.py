"""`keepsight train pvm`: teach a memory on your images and conversations, by supervised fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Literal

import typer

from keepsight.cli.common.console import first_of_all, quiet, say, with_examples
from keepsight.cli.common.options import recipe_of
from keepsight.cli.train.options import PvmOptions, TrainOptions
from keepsight.cli.train.showing import print_log, print_report, run_and_report, show_dry_run
from keepsight.train.run.fields import STEPS
from keepsight.train.run.settings import PAPER_SFT, SftSettings

PAPER = {**PAPER_SFT, "causal": False}


@with_examples(
    (
        "a file with one JSON object per line: images and messages",
        "keepsight train pvm Qwen/Qwen3-VL-4B-Instruct -d train.jsonl -o my-memory",
    ),
    ("is the file good?", "keepsight data check train.jsonl --model Qwen/Qwen3-VL-4B-Instruct"),
    ("will it fit? (no weights are read)", "keepsight train pvm Qwen/Qwen3-VL-4B-Instruct --dry-run"),
    (
        "try it in a minute on the tiny model that is built in",
        "keepsight train pvm keepsight/reference -d train.jsonl -o try --max-steps 50 --lr 3e-3",
    ),
    ("go on where a run stopped", "keepsight train pvm Qwen/Qwen3-VL-4B-Instruct -d train.jsonl -o my-memory --resume"),
    ("is it better than fine-tuning on the same data?", "keepsight train pvm ... --control lora,sft,none"),
    ("as the paper: no blindfold, gates at the common rate, the published rule", "... --recipe paper"),
    ("on eight GPUs", "accelerate launch --num_processes 8 -m keepsight.cli train pvm ..."),
)
def pvm(
    source: Annotated[str, typer.Argument(help="The base: a VLM's folder or hub id, or keepsight/reference.")],
    job: TrainOptions,
    memory: PvmOptions,
    settings: SftSettings,
    recipe: Annotated[
        Literal["keepsight", "paper"],
        typer.Option(
            help="Defaults of the settings: ours, or the paper's (no blindfold, gates at the common rate, the "
            "published rule). What is given beside it counts more.",
            rich_help_panel=STEPS,
            is_eager=True,
            callback=recipe_of({"keepsight": {}, "paper": PAPER}),
        ),
    ] = "keepsight",
) -> None:
    """Train a persistent visual memory on a frozen VLM (supervised fine-tuning through TRL).

    Samples are chats with images: "messages" and "images", or "prompt", "answer" and "image". The loss is on the
    assistant's words. Data, settings and output folder are checked completely before the first step. Defaults follow
    the PVM paper's first stage, with two additions of ours: a blindfold warm-up and faster gates. --recipe paper leaves
    them out.
    """
    quiet()
    config = memory.config()
    job.warn_of_idle(settings)
    named = _in_words(recipe, memory, settings)
    if job.dry_run:
        if settings.keep_language is not None:
            from keepsight.train.pvm.language import check_file

            check_file(settings.keep_language)
        return show_dry_run(source, settings, config, job, recipe=named)
    if first_of_all():
        say(f"recipe: {named}")
    from keepsight.train.pvm.sft import train_pvm

    train = partial(train_pvm, pvm=config, settings=settings)
    return run_and_report(train, source, job, print_log, print_report)


def _in_words(recipe: str, memory: PvmOptions, settings: SftSettings) -> str:
    """Whose recipe it is, and what of it was given otherwise."""
    given: dict[str, Any] = {name: getattr(memory if name == "causal" else settings, name) for name in PAPER}
    ours: dict[str, Any] = {name: getattr(PvmOptions() if name == "causal" else SftSettings(), name) for name in PAPER}
    meant = PAPER if recipe == "paper" else ours
    changed = [f"{name} {given[name]}" for name in PAPER if given[name] != meant[name]]
    words = "the paper's" if recipe == "paper" else "keepsight's"
    return f"{words}, but {', '.join(changed)}" if changed else words
