"""`keepsight data check`: is this dataset good for training? Everything wrong with it, found in one pass."""

from __future__ import annotations

import statistics
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepsight.cli.common.console import facts_table, out, quiet, say, with_examples
from keepsight.cli.common.options import Command
from keepsight.cli.common.progress import Progress
from keepsight.data.mixture import load_sources, mixture_of_words
from keepsight.data.tables.reading import COLUMNS_HELP, IGNORE_HELP, IMAGE_FOLDER_HELP
from keepsight.errors import KeepsightError

data_app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True)


@data_app.callback()
def _data() -> None:
    """Look at training data before a run does."""


@with_examples(
    ("columns, conversations and every image", "keepsight data check train.jsonl"),
    (
        "and what a model's processor and chat template make of them, in tokens",
        "keepsight data check train.jsonl --model Qwen/Qwen3-VL-4B-Instruct --max-length 4096",
    ),
    (
        "other names of columns, pictures in another folder",
        "keepsight data check rows.csv --columns question=query --columns answer=reply --image-folder photos",
    ),
    ("several datasets, and what share of an epoch each is", "keepsight data check photos.jsonl=3 charts.jsonl=1"),
    ("questions for reinforcement learning: prompt, answer, image", "keepsight data check questions.jsonl --for grpo"),
)
def check(
    dataset: Annotated[
        list[str],
        typer.Argument(
            help="A .jsonl, .json, .csv, .tsv or .parquet file, a dataset folder, or a hub id; several, also with "
            "weights (photos.jsonl=3), as training takes them."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="Rehearse the first batch with the processor of this VLM, and count tokens.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="The longest sample in tokens; needs --model.")] = None,
    purpose: Annotated[
        Literal["sft", "grpo"],
        typer.Option("--for", help="What for: sft learns the answers, grpo answers questions and is rewarded."),
    ] = "sft",
    columns: Annotated[list[str] | None, typer.Option(help=COLUMNS_HELP)] = None,
    ignore: Annotated[list[str] | None, typer.Option(help=IGNORE_HELP)] = None,
    image_folder: Annotated[Path | None, typer.Option(help=IMAGE_FOLDER_HELP)] = None,
    split: Annotated[str, typer.Option(help="Which split of the dataset, if it has several.")] = "train",
    images: Annotated[
        Literal["full", "quick"], typer.Option(help="full opens every image; quick looks whether it is there.")
    ] = "full",
    show: Annotated[int, typer.Option(help="How many problems to name.")] = 10,
) -> None:
    """Check a dataset: its format, conversations, images, what is not used, lengths, and repetitions.

    Ends with exit status 1 if any sample could not be trained on as it is; the same checks run before every training.
    """
    quiet()
    from keepsight.data.check import check_dataset, without_images
    from keepsight.data.mixing import MixedData

    if max_length is not None and model is None:
        raise KeepsightError("--max-length counts tokens, and every model makes other ones: name it with --model.")
    sources, weights = load_sources(mixture_of_words(dataset, columns or (), ignore or (), image_folder), split)
    decoded = images == "full" or model is not None
    several = []
    for source in sources:
        with Progress("the check", transient=True) as bars:
            one = check_dataset(
                source,
                kind="chat" if purpose == "sft" else "prompt",
                text_only="keep",
                decode=decoded,
                rehearse=_rehearsal(model, purpose == "sft", source.reading.ignore),
                max_length=max_length,
                need_answer=purpose == "grpo",
                progress=partial(bars, "checking samples"),
            )
        out.print(_table(one, len(source.rows), decoded, max_length), markup=False)
        several.append(one)
    found = several[0] if len(several) == 1 else MixedData.of(several, weights)
    for where, what in found.problems[:show]:
        say(f"{where}, {what}")
    if len(found.problems) > show:
        say(f"... and {len(found.problems) - show:,} more (--show names them)")
    for hint in found.hints:
        say(hint)
    if found.text_only == found.rows > 0:
        say("No sample has an image, so there is nothing that a visual memory could learn.")
        for source in sources:
            if more := without_images(source):
                say(more.strip())
    elif found.text_only:
        say("Training stops at samples without an image unless told: --text-only skip or --text-only keep.")
    if found.problems or found.text_only == found.rows:
        raise typer.Exit(1)
    mix = found.good().mix()
    if mix is not None:
        say(f"mix: {mix}")
    say("Good for training with one of these." if found.text_only else "Good for training.")


data_app.command("check", cls=Command)(check)


def _rehearsal(model: str | None, answered: bool, ignore: tuple[str, ...]) -> Any:
    """What the first batch does, by the model's processor and chat template."""
    from keepsight.data.rehearsal import Rehearsal

    if model is None:
        return Rehearsal(None, answered, ignore=ignore)
    from keepsight.checkpoints.bases import base_config
    from keepsight.checkpoints.load import load_processor
    from keepsight.data.collate import ConversationCollator

    if not Path(model, "adapter_config.json").is_file():  # whose processor stands beside it
        base_config(model)
    return Rehearsal(ConversationCollator(load_processor(model)), answered, count=True, ignore=ignore)


def _table(found: Any, total: int, decoded: bool, max_length: int | None) -> Any:
    from keepsight.words import counted

    table = facts_table(found.source.name)
    good = found.rows
    table.add_row("samples", f"{good:,} of {total:,} are good{'' if good < total else ', all of them'}")
    table.add_row("columns", ", ".join(found.source.columns))
    for subject, words in found.told_lines():
        table.add_row(subject, words)
    for kind, count in Counter(_kind(what) for _, what in found.problems).most_common():
        table.add_row(f"bad: {kind}", counted(count, "sample"))
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
