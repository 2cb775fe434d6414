"""`keepsight data check`: is this dataset good for training? Everything wrong with it, found in one pass."""

from __future__ import annotations

import statistics
from collections import Counter
from functools import partial
from typing import Annotated, Any, Literal

import typer

from keepsight.cli.console import out, quiet, say, with_examples
from keepsight.cli.options import Command
from keepsight.cli.progress import Progress
from keepsight.errors import KeepsightError

data_app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True)


@data_app.callback()
def _data() -> None:
    """Look at training data before a run does."""


@with_examples(
    ("columns, conversations and every image", "keepsight data check train.jsonl"),
    (
        "and lengths in tokens, as a model's processor and chat template make them",
        "keepsight data check train.jsonl --model Qwen/Qwen3-VL-4B-Instruct --max-length 4096",
    ),
    ("questions for reinforcement learning: prompt, answer, image", "keepsight data check questions.jsonl --for grpo"),
)
def check(
    dataset: Annotated[
        str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, a dataset folder, or a hub id.")
    ],
    model: Annotated[str | None, typer.Option(help="Measure lengths with the processor of this VLM.")] = None,
    max_length: Annotated[int | None, typer.Option(help="The longest sample in tokens; needs --model.")] = None,
    purpose: Annotated[
        Literal["sft", "grpo"],
        typer.Option("--for", help="What for: sft learns the answers, grpo answers questions and is rewarded."),
    ] = "sft",
    split: Annotated[str, typer.Option(help="Which split of the dataset, if it has several.")] = "train",
    images: Annotated[
        Literal["full", "quick"], typer.Option(help="full opens every image; quick looks whether it is there.")
    ] = "full",
    show: Annotated[int, typer.Option(help="How many problems to name.")] = 10,
) -> None:
    """Check a dataset: columns, conversations, images, lengths, samples without an image, and repetitions.

    Ends with exit status 1 if any sample could not be trained on as it is; the same checks run before every training.
    """
    quiet()
    from keepsight.data.check import load_dataset_any, survey_dataset

    if max_length is not None and model is None:
        raise KeepsightError("--max-length counts tokens, and every model makes other ones: name it with --model.")
    source = load_dataset_any(dataset, split)
    measure = None if model is None else _measure(model, purpose, source.folder)
    with Progress("the check", transient=True) as bars:
        found = survey_dataset(
            source,
            kind="chat" if purpose == "sft" else "prompt",
            text_only="keep",
            decode=images == "full" and measure is None,
            measure=measure,
            max_length=max_length,
            need_answer=purpose == "grpo",
            progress=partial(bars, "checking samples"),
        )
    out.print(_table(found, len(source.rows), images == "full" or measure is not None, max_length), markup=False)
    for where, what in found.problems[:show]:
        say(f"{where}, {what}")
    if len(found.problems) > show:
        say(f"... and {len(found.problems) - show:,} more (--show names them)")
    for hint in found.hints:
        say(hint)
    if found.text_only == len(found.rows) > 0:
        say("No sample has an image, so there is nothing that a visual memory could learn.")
    elif found.text_only:
        say("Training stops at samples without an image unless told: --text-only skip or --text-only keep.")
    if found.problems or found.text_only == len(found.rows):
        raise typer.Exit(1)
    say("Good for training with one of these." if found.text_only else "Good for training.")


data_app.command("check", cls=Command)(check)


def _measure(model: str, purpose: str, folder: Any) -> Any:
    """Sample -> (tokens, tokens that must not be cut), by the model's processor and chat template."""
    from keepsight.data.collate import ConversationCollator
    from keepsight.data.images import open_image
    from keepsight.train.run import preflight

    collator = ConversationCollator(preflight.load_processor(model))

    def measure(sample: dict[str, Any]) -> tuple[int, int]:
        opened = [open_image(image, folder) for image in sample["images"]]
        if purpose == "sft":
            return collator.measure({"messages": sample["messages"], "images": opened})
        length, _ = collator.prompt_tokens(sample["messages"], opened)
        return length, length

    return measure


def _table(found: Any, total: int, decoded: bool, max_length: int | None) -> Any:
    from rich.table import Table

    table = Table(title=found.source.name, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    good = len(found.rows)
    table.add_row("samples", f"{good:,} of {total:,} are good{'' if good < total else ', all of them'}")
    table.add_row("columns", ", ".join(found.source.columns))
    for kind, count in Counter(_kind(what) for _, what in found.problems).most_common():
        table.add_row(f"bad: {kind}", f"{count:,} samples")
    counts = Counter(found.image_counts)
    if good:
        several = ", ".join(f"{n:,} with {count}" for count, n in sorted(counts.items())[:6])
        how = "all opened" if decoded else "only looked for, not opened"
        table.add_row("images per sample", f"{several} ({how})")
        table.add_row("without an image", f"{found.text_only:,}, {found.text_only / good:.1%} of the good ones")
        table.add_row("repeated", f"{found.duplicates:,} equal an earlier sample, word for word and image for image")
    if found.lengths:
        middle, longest = statistics.median(found.lengths), max(found.lengths)
        limit = f", within the {max_length:,} of --max-length" if max_length else ""
        table.add_row("tokens", f"{min(found.lengths):,} to {longest:,}, half up to {middle:,.0f}{limit}")
    return table


def _kind(what: str) -> str:
    """The column that a problem is about, and for lengths that."""
    column = what.partition(":")[0].partition("[")[0]
    return "length" if "tokens after processing" in what else column
