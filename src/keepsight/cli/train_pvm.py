"""`keepsight train pvm`: teach a memory on your images and conversations, by supervised fine-tuning."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from keepsight.cli import train_options as ask
from keepsight.cli.console import debugging, quiet, with_examples


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
    ("the look-up forms sooner if the base is blindfolded at first", "keepsight train pvm ... --blindfold-steps 200"),
    ("on eight GPUs", "accelerate launch --num_processes 8 -m keepsight.cli train pvm ..."),
)
def pvm(
    source: Annotated[str, typer.Argument(help="The base: a VLM's folder or hub id, or keepsight/reference.")],
    dataset: ask.Data = None,
    output_dir: ask.Output = None,
    eval_dataset: ask.EvalData = None,
    eval_split: ask.EvalSplit = None,
    split: ask.Split = "train",
    text_only: ask.TextOnly = "error",
    max_length: Annotated[
        int | None, ask.option("Longest sample in tokens, images included. Default: no limit.", panel=ask.DATA)
    ] = None,
    over_long: Annotated[
        Literal["error", "skip", "truncate"],
        ask.option("What to do with longer ones. truncate cuts answers, never images.", panel=ask.DATA),
    ] = "error",
    check: ask.Check = "full",
    layers: ask.Layers = None,
    width: ask.Width = None,
    causal: ask.Causal = True,
    blindfold_steps: Annotated[
        int,
        ask.option(
            "For so many first steps the frozen base cannot see the image, so the memory must. Not in the paper.",
            panel=ask.MEMORY,
        ),
    ] = 0,
    blindfold_share: Annotated[
        float | None,
        ask.option(
            "The share of the later steps that is blindfolded too, so that the look-up is not lost again. Default: 0.5 "
            "with --blindfold-steps, else 0 (the paper's recipe).",
            panel=ask.MEMORY,
        ),
    ] = None,
    epochs: ask.Epochs = 1.0,
    max_steps: ask.MaxSteps = None,
    batch_size: Annotated[int, ask.option("Samples per device and forward.", panel=ask.STEPS)] = 1,
    grad_accum: ask.GradAccum = 8,
    lr: ask.Lr = 1e-4,
    gate_lr_multiplier: ask.GateLr = 10.0,
    warmup_ratio: ask.Warmup = 0.1,
    scheduler: ask.Scheduler = "cosine",
    weight_decay: ask.WeightDecay = 0.0,
    max_grad_norm: ask.MaxGradNorm = 1.0,
    seed: ask.Seed = 0,
    bf16: ask.Bf16 = None,
    gradient_checkpointing: ask.Checkpointing = None,
    dtype: ask.Dtype = "auto",
    load_in_4bit: ask.FourBit = False,
    device: ask.Device = None,
    logging_steps: ask.LoggingSteps = 10,
    save_steps: ask.SaveSteps = 200,
    eval_steps: ask.EvalSteps = None,
    keep_checkpoints: ask.KeepCheckpoints = None,
    resume: ask.Resume = False,
    overwrite: ask.Overwrite = False,
    control: ask.Controls = None,
    dry_run: ask.DryRun = False,
    tokens: ask.Tokens = None,
    workers: ask.Workers = 0,
    report_to: ask.ReportTo = None,
) -> None:
    """Train a persistent visual memory on a frozen VLM (supervised fine-tuning through TRL).

    Samples are chats with images: "messages" and "images", or "prompt", "answer" and "image". The loss is on the
    assistant's words. Data, settings and output folder are checked completely before the first step. Defaults follow
    the PVM paper's first stage.
    """
    chosen = dict(locals())
    if not debugging():
        quiet()
    from keepsight.pvm import PvmConfig
    from keepsight.train.pvm.sft import SftSettings, train_pvm
    from keepsight.train.run.controls import parse_controls

    settings = ask.settings_of(SftSettings, chosen)
    memory = PvmConfig(layers=ask.parse_layers(layers), width=width, causal=causal)
    ask.warn_of_idle(chosen)
    if dry_run:
        return ask.show_dry_run(source, settings, memory, dataset, split, tokens)
    dataset, output_dir = ask.check_choices(resume, overwrite, dataset, output_dir)
    train = partial(
        train_pvm,
        source,
        dataset,
        output_dir,
        pvm=memory,
        eval_dataset=eval_dataset,
        eval_split=eval_split,
        settings=settings,
        split=split,
        resume=resume,
        overwrite=overwrite,
        check=check,
        controls=parse_controls(control or ()),
    )
    ask.run_and_report(train, output_dir, source)
    return None
