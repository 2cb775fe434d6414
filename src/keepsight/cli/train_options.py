"""What the commands that train a PVM ask alike, and how they show what happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepsight.cli.console import Interrupted, out, say, warn
from keepsight.errors import KeepsightError

DATA, MEMORY, STEPS, RUN = "Data", "The memory", "Optimisation", "The run"


def option(help_text: str, *names: str, panel: str) -> Any:
    """An option in a panel."""
    return typer.Option(*names, help=help_text, rich_help_panel=panel)


_DATA_HELP = "A .jsonl, .json, .csv or .parquet file, a dataset folder, or a hub id."

# Every default is in the settings' dataclasses, where its source is told.
Data = Annotated[str | None, option(_DATA_HELP, "--data", "--dataset", "-d", panel=DATA)]
Output = Annotated[Path | None, option("Gets checkpoints and the result.", "--output-dir", "-o", panel=RUN)]
EvalData = Annotated[str | None, option("Data for evaluation.", "--eval-dataset", panel=DATA)]
EvalSplit = Annotated[str | None, option("Which split of --eval-dataset. Default: as --split.", panel=DATA)]
Split = Annotated[str, option("Which split of the dataset, if it has several.", panel=DATA)]
TextOnly = Annotated[
    Literal["error", "skip", "keep"],
    option("What to do with samples without an image: they teach a memory nothing.", panel=DATA),
]
Check = Annotated[
    Literal["full", "quick"],
    option("full opens every image before training; quick only looks whether it is there.", panel=DATA),
]
Layers = Annotated[
    str | None, option("Decoder layers that get a block, e.g. 8,16,24. Default: as the paper.", panel=MEMORY)
]
Width = Annotated[int | None, option("Latent width. Default: 512, or what fits.", panel=MEMORY)]
Causal = Annotated[
    bool,
    option("Text reads the images before it, or (as published) all images.", "--causal/--published-rule", panel=MEMORY),
]
Epochs = Annotated[float, option("Passes over the data.", panel=STEPS)]
MaxSteps = Annotated[int | None, option("Optimiser steps; overrides --epochs.", panel=STEPS)]
GradAccum = Annotated[int, option("Forwards per step.", panel=STEPS)]
Lr = Annotated[float, option("Peak learning rate.", panel=STEPS)]
GateLr = Annotated[float, option("The gates learn so many times faster. Not in the paper.", panel=STEPS)]
Warmup = Annotated[float, option("Share of the steps with a rising rate.", panel=STEPS)]
Scheduler = Annotated[str, option("cosine, linear, constant, ...", panel=STEPS)]
WeightDecay = Annotated[float, option("Of matrices.", panel=STEPS)]
MaxGradNorm = Annotated[float, option("Gradients are clipped to it.", panel=STEPS)]
Seed = Annotated[int, option("Of initialisation, data order and sampling.", panel=STEPS)]
Bf16 = Annotated[bool | None, option("Default: on a GPU that has it.", "--bf16/--no-bf16", panel=RUN)]
Checkpointing = Annotated[
    bool | None,
    option(
        "Less memory, more time. Default: on a GPU.",
        "--gradient-checkpointing/--no-gradient-checkpointing",
        panel=RUN,
    ),
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], option("Of the base.", panel=RUN)]
FourBit = Annotated[
    bool,
    option(
        "Hold the base's linear maps in four bits (NF4, bitsandbytes): a third of the memory, slower; not in the "
        "papers.",
        "--load-in-4bit",
        panel=RUN,
    ),
]
Device = Annotated[Literal["cpu", "cuda"] | None, option("Default: the GPU if there is one.", panel=RUN)]
LoggingSteps = Annotated[int, option("A line every so many steps.", panel=RUN)]
SaveSteps = Annotated[int, option("A checkpoint every so many steps.", panel=RUN)]
EvalSteps = Annotated[int | None, option("Evaluate every so many steps. Default: as --save-steps.", panel=RUN)]
KeepCheckpoints = Annotated[int | None, option("How many checkpoints to keep. Default: all.", panel=RUN)]
Resume = Annotated[bool, option("Go on from the last whole checkpoint in --output-dir.", "--resume", panel=RUN)]
Overwrite = Annotated[bool, option("Start anew; what is there is moved aside, not deleted.", "--overwrite", panel=RUN)]
Workers = Annotated[int, option("Processes that read images.", panel=RUN)]
ReportTo = Annotated[list[str] | None, option("tensorboard, wandb, trackio, ...; repeat for several.", panel=RUN)]
Controls = Annotated[
    list[str] | None,
    option(
        "Then train the same without the memory, and set both side by side: lora, mlp, sft, none (the base), several "
        "with commas; sft=1e-5 for a learning rate of its own.",
        "--control",
        panel=RUN,
    ),
]
DryRun = Annotated[
    bool,
    option("Train nothing: print what would be trained, the memory it needs, and one traced step.", panel=RUN),
]
Tokens = Annotated[
    int | None, option("With --dry-run: tokens of a sample. Default: the longest of the data, else 2048.", panel=RUN)
]


def settings_of(kind: type, chosen: dict[str, Any], **otherwise: Any) -> Any:
    """A settings dataclass from a command's options of the same names.

    Args:
        kind: the dataclass.
        chosen: name of an option -> its value; others than the dataclass has are left alone.
        otherwise: fields that are no option as they are.
    """
    values = {field.name: chosen[field.name] for field in fields(kind) if field.name in chosen}
    return kind(**(values | {"report_to": tuple(chosen["report_to"] or ())} | otherwise))


def check_choices(resume: bool, overwrite: bool, dataset: str | None, output_dir: Path | None) -> tuple[str, Path]:
    """Refuse what contradicts itself or is missing; returns data and folder."""
    if resume and overwrite:
        raise KeepsightError("--resume goes on with a run and --overwrite starts anew; give one of them.")
    if dataset is None or output_dir is None:
        missing = " and ".join(n for n, v in (("--data", dataset), ("--output-dir", output_dir)) if v is None)
        raise typer._click.exceptions.UsageError(f"Missing option {missing}; only --dry-run does without")
    return dataset, output_dir


def warn_of_idle(chosen: dict[str, Any]) -> None:
    """Warn of options that have no effect as the others are."""
    dry, evaluates = chosen["dry_run"], chosen["eval_dataset"] is not None
    idle = {
        "--tokens": not dry and chosen["tokens"] is not None and "without --dry-run",
        "--control": dry and chosen["control"] and "with --dry-run, which is of the memory's own run",
        "--eval-split": not evaluates and chosen["eval_split"] is not None and "without --eval-dataset",
        "--eval-steps": not (evaluates or chosen["control"])
        and chosen.get("eval_steps") is not None
        and "without --eval-dataset",
        "--warm-start-lr": not chosen.get("warm_start_steps")
        and chosen.get("warm_start_lr", 3e-3) != 3e-3
        and "without --warm-start-steps",
    }
    for name, why in idle.items():
        if why and is_first():
            warn(f"{name} has no effect {why}.")


def show_dry_run(
    source: str,
    settings: Any,
    memory: Any,
    dataset: str | None,
    split: str,
    tokens: int | None,
    policy: str = "none",
    lora_rank: int = 16,
) -> None:
    """Print what a run would need. The length of a sample is asked for, measured on the data, or assumed."""
    from keepsight.checkpoints.sources import as_adapter
    from keepsight.pvm import PvmConfig
    from keepsight.train.cost import dry_run
    from keepsight.train.pvm.plan import plan_memory
    from keepsight.train.run.learner import Learner, ranked_lora

    found = as_adapter(source)
    base, pvm = source, memory
    if found is not None:
        from keepsight.checkpoints.sources import check_sources
        from keepsight.peft_method import config_from_adapter

        base, _ = check_sources(source)
        pvm = config_from_adapter(PvmConfig, found.config)
    plan = plan_memory(base, pvm)
    length, visual = tokens, None
    if length is None and dataset is not None:
        length, visual = dry_run.measured(base, dataset, split, answers=not hasattr(settings, "completions"))
        say(f"the longest of the samples looked at: {length:,} tokens, {visual:,} of them visual")
    if length is None:
        length = settings.max_length or dry_run.DEFAULT_TOKENS
        say(f"a sample of {length:,} tokens is assumed; --tokens or --data say otherwise")
    lora = ranked_lora(plan.backbone, lora_rank)[0] if policy == "lora" else None
    beside = {"full": " and the language model", "lora": f" and a LoRA of rank {lora_rank}", "none": ""}[policy]
    learner = Learner(memory=pvm or PvmConfig(), policy=policy, lora=lora)  # type: ignore[arg-type]
    result = dry_run.dry_run(base, learner, settings, length=length, visual=visual, what=f"the memory{beside}")
    out.print(dry_run.print_dry_run(result), markup=False)


def is_first() -> bool:
    """Of several processes, one talks."""
    return os.environ.get("RANK", "0") == "0"


def run_and_report(train: Callable[..., Any], output_dir: Path, source: str) -> None:
    """Call `train(say=..., on_log=..., on_check=...)` and show what comes of it."""
    first = is_first()
    try:
        report = train(say=say if first else nothing, on_log=print_log, on_check=CheckProgress() if first else None)
    except KeyboardInterrupt as stop:
        raise Interrupted(how_to_go_on(output_dir)) from stop
    if first:
        print_report(report, source)


def nothing(line: str) -> None:
    """Say nothing."""


def parse_layers(text: str | None) -> list[int] | None:
    """Layers as written on the command line."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError as error:
        raise KeepsightError(f"--layers {text}: expected numbers with commas between them, such as 8,16,24.") from error


class CheckProgress:
    """A counter on a terminal while samples are checked; silent elsewhere."""

    def __call__(self, done: int, total: int) -> None:
        """So many samples are checked."""
        if not sys.stderr.isatty() or (done % 100 and done != total):
            return
        sys.stderr.write(f"\rchecking samples {done:,}/{total:,}" + ("\r\033[K" if done == total else ""))
        sys.stderr.flush()


def print_log(values: dict[str, float], step: int, total: int) -> None:
    """One line per logging step."""
    from keepsight.train.run.monitor import line

    for text in line(values, step, total):
        say(text)


def how_to_go_on(folder: Path) -> str:
    """What to tell somebody who stopped a run."""
    from keepsight.train.run.output import last_checkpoint

    checkpoint, _ = last_checkpoint(folder)
    if checkpoint is None:
        return "stopped by Ctrl-C before the first checkpoint; nothing was saved."
    return f"stopped by Ctrl-C. {checkpoint} is whole: the same command with --resume goes on from there."


def print_report(report: Any, source: str) -> None:
    """What a run did, in a table; then its controls beside it."""
    from rich.table import Table

    table = Table(title=f"A memory for {source}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    resumed = f", resumed at {report.resumed_from}" if report.resumed_from else ""
    table.add_row("steps", f"{report.steps}{resumed}, {report.seconds:.1f} s, {report.tokens:,} tokens")
    if report.first_loss is not None:
        table.add_row("loss", f"{report.first_loss:.4f} at first, {report.last_loss:.4f} at last")
    if report.first_reward is not None:
        table.add_row("reward", f"{report.first_reward:.4f} at first, {report.last_reward:.4f} at last")
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_reward"):
        if name in report.metrics and not (name == "eval_loss" and "eval_reward" in report.metrics):
            table.add_row(name.replace("_", " "), f"{report.metrics[name]:.4f}")
    table.add_row("trained", f"{report.trainable:,} parameters")
    same = {
        True: "no bit of any tensor changed (digests before and after)",
        None: "not checked: the weights are partitioned over processes",
    }
    table.add_row("frozen", f"{report.frozen:,} parameters; {same[report.base_unchanged]}")
    table.add_row("gates", ", ".join(f"layer {layer}: {gate:+.4f}" for layer, gate in report.gates.items()))
    if report.data.skipped:
        table.add_row("skipped", f"{len(report.data.skipped)} of {report.data.rows + len(report.data.skipped)} samples")
    if report.cost is not None:
        peak = f"{report.cost.peak_memory / 2**30:.2f} GiB on the {report.cost.device}"
        table.add_row("cost", f"{report.cost.flops / 1e15:.4g} PFLOP by its shapes, at most {peak}")
    table.add_row("result", str(report.output_dir))
    table.add_row("use it", f"keepsight generate {report.output_dir} --image FILE --prompt TEXT")
    out.print(table, markup=False)
    if all(gate == 0 for gate in report.gates.values()):
        warn("Every gate is still 0, so the memory changes nothing. Train for more steps or with a larger --lr.")
    if report.comparison is not None:
        out.print(report.comparison.table(), markup=False)
