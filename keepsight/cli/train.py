"""`keepsight train pvm`: teach a memory on your images and conversations."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepsight.cli import train_vismem
from keepsight.cli.console import Interrupted, debugging, out, quiet, say, warn, with_examples
from keepsight.errors import KeepsightError

train_app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True)


@train_app.callback()
def _train() -> None:
    """Teach a memory on your images and conversations. The model itself stays frozen."""


DATA, MEMORY, STEPS, RUN = "Data", "The memory", "Optimisation", "The run"


@with_examples(
    (
        "a file with one JSON object per line: images and messages",
        "keepsight train pvm Qwen/Qwen3-VL-4B-Instruct -d train.jsonl -o my-memory",
    ),
    (
        "try it in a minute on the tiny model that is built in",
        "keepsight train pvm keepsight/reference -d train.jsonl -o try --max-steps 50 --lr 3e-3",
    ),
    ("go on where a run stopped", "keepsight train pvm Qwen/Qwen3-VL-4B-Instruct -d train.jsonl -o my-memory --resume"),
    ("the look-up forms sooner if the base is blindfolded at first", "keepsight train pvm ... --blindfold-steps 200"),
    ("on eight GPUs", "accelerate launch --num_processes 8 -m keepsight.cli train pvm ..."),
)
def pvm(
    source: Annotated[str, typer.Argument(help="The base: a VLM's folder or hub id, or keepsight/reference.")],
    dataset: Annotated[
        str,
        typer.Option(
            "--data",
            "--dataset",
            "-d",
            help="A .jsonl, .json, .csv or .parquet file, a dataset folder, or a hub id.",
            rich_help_panel=DATA,
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="Gets checkpoints and the adapter.", rich_help_panel=RUN)
    ],
    eval_dataset: Annotated[
        str | None, typer.Option("--eval-dataset", help="Data for the evaluation loss.", rich_help_panel=DATA)
    ] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Which split of --eval-dataset. Default: as --split.", rich_help_panel=DATA)
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which split of the dataset, if it has several.", rich_help_panel=DATA)
    ] = "train",
    text_only: Annotated[
        Literal["error", "skip", "keep"],
        typer.Option(
            help="What to do with samples without an image: they teach a memory nothing.", rich_help_panel=DATA
        ),
    ] = "error",
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest sample in tokens, images included. Default: no limit.", rich_help_panel=DATA),
    ] = None,
    over_long: Annotated[
        Literal["error", "skip", "truncate"],
        typer.Option(help="What to do with longer ones. truncate cuts answers, never images.", rich_help_panel=DATA),
    ] = "error",
    check: Annotated[
        Literal["full", "quick"],
        typer.Option(
            help="full opens every image before training; quick only looks whether it is there.", rich_help_panel=DATA
        ),
    ] = "full",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Decoder layers that get a block, e.g. 8,16,24. Default: as the paper.", rich_help_panel=MEMORY
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Latent width. Default: 512, or what fits.", rich_help_panel=MEMORY)
    ] = None,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal/--published-rule",
            help="Text reads the images before it, or (as published) all images.",
            rich_help_panel=MEMORY,
        ),
    ] = True,
    blindfold_steps: Annotated[
        int,
        typer.Option(
            help="For so many first steps the frozen base cannot see the image, so the memory must. Not in the paper.",
            rich_help_panel=MEMORY,
        ),
    ] = 0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=STEPS)] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; overrides --epochs.", rich_help_panel=STEPS)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per device and forward.", rich_help_panel=STEPS)] = 1,
    grad_accum: Annotated[int, typer.Option(help="Forwards per step.", rich_help_panel=STEPS)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=STEPS)] = 1e-4,
    gate_lr_multiplier: Annotated[
        float, typer.Option(help="The gates learn so many times faster. Not in the paper.", rich_help_panel=STEPS)
    ] = 10.0,
    warmup_ratio: Annotated[
        float, typer.Option(help="Share of the steps with a rising rate.", rich_help_panel=STEPS)
    ] = 0.1,
    scheduler: Annotated[str, typer.Option(help="cosine, linear, constant, ...", rich_help_panel=STEPS)] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of matrices.", rich_help_panel=STEPS)] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.", rich_help_panel=STEPS)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.", rich_help_panel=STEPS)] = 0,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Default: on a GPU that has it.", rich_help_panel=RUN)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory, more time. Default: on a GPU.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the frozen base.", rich_help_panel=RUN)
    ] = "auto",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: the GPU if there is one.", rich_help_panel=RUN)
    ] = None,
    logging_steps: Annotated[int, typer.Option(help="A line every so many steps.", rich_help_panel=RUN)] = 10,
    save_steps: Annotated[int, typer.Option(help="A checkpoint every so many steps.", rich_help_panel=RUN)] = 200,
    eval_steps: Annotated[
        int | None, typer.Option(help="Evaluate every so many steps. Default: as --save-steps.", rich_help_panel=RUN)
    ] = None,
    keep_checkpoints: Annotated[
        int | None, typer.Option(help="How many checkpoints to keep. Default: all.", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the last whole checkpoint in --output-dir.", rich_help_panel=RUN),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start anew; what is there is moved aside, not deleted.", rich_help_panel=RUN),
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that read images.", rich_help_panel=RUN)] = 0,
    report_to: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb, ...; repeat for several.", rich_help_panel=RUN)
    ] = None,
) -> None:
    """Train a persistent visual memory on a frozen VLM (supervised fine-tuning through TRL).

    Samples are chats with images: "messages" and "images", or "prompt", "answer" and "image". The loss is on the
    assistant's words. Data, settings and output folder are checked completely before the first step. Defaults follow
    the PVM paper's first stage.
    """
    if resume and overwrite:
        raise KeepsightError("--resume goes on with a run and --overwrite starts anew; give one of them.")
    if not debugging():
        quiet()
    from keepsight.pvm import PvmConfig
    from keepsight.train.sft import SftSettings, train_pvm

    settings = SftSettings(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        lr=lr,
        gate_lr_multiplier=gate_lr_multiplier,
        warmup_ratio=warmup_ratio,
        scheduler=scheduler,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        max_length=max_length,
        over_long=over_long,
        text_only=text_only,
        blindfold_steps=blindfold_steps,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype,
        device=device,
        seed=seed,
        logging_steps=logging_steps,
        save_steps=save_steps,
        eval_steps=eval_steps,
        keep_checkpoints=keep_checkpoints,
        workers=workers,
        report_to=tuple(report_to or ()),
    )
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one talks
    try:
        report = train_pvm(
            source,
            dataset,
            output_dir,
            pvm=PvmConfig(layers=_parse_layers(layers), width=width, causal=causal),
            eval_dataset=eval_dataset,
            eval_split=eval_split,
            settings=settings,
            split=split,
            resume=resume,
            overwrite=overwrite,
            check=check,
            say=say if first else _nothing,
            on_log=_print_log,
            on_check=_CheckProgress() if first else None,
        )
    except KeyboardInterrupt as stop:
        raise Interrupted(_how_to_go_on(output_dir)) from stop
    if first:
        _print_report(report, source)


train_app.command("pvm")(pvm)
train_app.command("vismem-formation")(train_vismem.formation)
train_app.command("vismem-invocation")(train_vismem.invocation)


def _nothing(line: str) -> None:
    """Say nothing."""


def _parse_layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise KeepsightError(f"--layers {text}: expected numbers with commas between them, such as 8,16,24.") from error


class _CheckProgress:
    """A counter on a terminal while samples are checked; silent elsewhere."""

    def __call__(self, done: int, total: int) -> None:
        if not sys.stderr.isatty() or (done % 100 and done != total):
            return
        sys.stderr.write(f"\rchecking samples {done:,}/{total:,}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()


def _print_log(values: dict[str, float], step: int, total: int) -> None:
    """One line per logging step."""
    head = f"step {step:>{len(str(total))}}/{total}"
    if "eval_loss" in values:
        say(f"{head}  eval loss {values['eval_loss']:.4f}")
    if "loss" in values:
        gates = " ".join(f"{name.partition('/')[2]}:{v:+.4f}" for name, v in values.items() if name.startswith("gate/"))
        accuracy = values.get("mean_token_accuracy", float("nan"))
        say(
            f"{head}  loss {values['loss']:.4f}  token accuracy {accuracy:.3f}  lr {values['learning_rate']:.2e}  "
            f"tokens {values.get('num_tokens', 0):,.0f}  gates {gates}"
        )


def _how_to_go_on(folder: Path) -> str:
    from keepsight.train.output import last_checkpoint

    checkpoint, _ = last_checkpoint(folder)
    if checkpoint is None:
        return "stopped by Ctrl-C before the first checkpoint; nothing was saved."
    return f"stopped by Ctrl-C. {checkpoint} is whole: the same command with --resume goes on from there."


def _print_report(report: Any, source: str) -> None:
    from rich.table import Table

    table = Table(title=f"A memory for {source}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    resumed = f", resumed at {report.resumed_from}" if report.resumed_from else ""
    table.add_row("steps", f"{report.steps}{resumed}, {report.seconds:.1f} s, {report.tokens:,} tokens")
    if report.first_loss is not None:
        table.add_row("loss", f"{report.first_loss:.4f} at first, {report.last_loss:.4f} at last")
    table.add_row("trained", f"{report.trainable:,} parameters")
    same = {
        True: "no bit of any tensor changed (checksums before and after)",
        None: "not checked: the weights are partitioned over processes",
    }
    table.add_row("frozen base", f"{report.frozen:,} parameters; {same[report.base_unchanged]}")
    table.add_row("gates", ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in report.gates.items()))
    if report.data.skipped:
        table.add_row("skipped", f"{len(report.data.skipped)} of {report.data.rows + len(report.data.skipped)} samples")
    table.add_row("adapter", str(report.output_dir))
    table.add_row("use it", f"keepsight generate {report.output_dir} --image FILE --prompt TEXT")
    out.print(table, markup=False)
    if all(gate == 0 for gate in report.gates.values()):
        warn("Every gate is still 0, so the memory changes nothing. Train for more steps or with a larger --lr.")
