"""`keepsight train vismem-formation` and `vismem-invocation`: the two stages of a latent vision memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keepsight.cli.console import Interrupted, debugging, out, quiet, say, with_examples
from keepsight.errors import KeepsightError

DATA, MEMORY, REWARD, STEPS, RUN = "Data", "The memory", "What is rewarded", "Optimisation", "The run"


def _option(help_text: str, *names: str, panel: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel)


# What both commands ask. Every default is in the settings' dataclasses, where its source is told.
Data = Annotated[
    str,
    _option("Questions: .jsonl, .json, .csv, .parquet, a dataset folder, or a hub id.", "--data", "-d", panel=DATA),
]
Output = Annotated[Path, _option("Gets checkpoints and the adapter.", "--output-dir", "-o", panel=RUN)]
Rewards = Annotated[
    list[str] | None,
    _option(
        "format, answer, match, or package.module:function, with =WEIGHT behind it; repeat for several. Default: "
        "format (0.1) and answer (0.9).",
        "--reward",
        panel=REWARD,
    ),
]
Split = Annotated[str, _option("Which split of the dataset, if it has several.", panel=DATA)]
TextOnly = Annotated[
    Literal["error", "skip", "keep"],
    _option("What to do with samples without an image (they have long-term memory only).", panel=DATA),
]
Check = Annotated[
    Literal["full", "quick"],
    _option("full opens every image before training; quick only looks whether it is there.", panel=DATA),
]
Gain = Annotated[
    Literal["replay", "score"],
    _option(
        "replay: the paper's dS, score minus that of the same beginning continued without memory. score: the score "
        "alone, which saves those rollouts (ours).",
        panel=REWARD,
    ),
]
Epochs = Annotated[float, _option("Passes over the questions.", panel=STEPS)]
MaxSteps = Annotated[int | None, _option("Optimiser steps; overrides --epochs.", panel=STEPS)]
BatchSize = Annotated[int, _option("Questions per step, all processes together.", panel=STEPS)]
GroupSize = Annotated[int, _option("Trajectories per question.", panel=STEPS)]
Iterations = Annotated[int, _option("Optimiser steps per batch of trajectories.", panel=STEPS)]
Lr = Annotated[float, _option("Peak learning rate (AdamW).", panel=STEPS)]
Warmup = Annotated[float, _option("Share of the steps with a rising rate.", panel=STEPS)]
Scheduler = Annotated[Literal["cosine", "linear", "constant"], _option("How the rate falls.", panel=STEPS)]
WeightDecay = Annotated[float, _option("Of everything that is trained.", panel=STEPS)]
MaxGradNorm = Annotated[float, _option("Gradients are clipped to it (ours).", panel=STEPS)]
Clip = Annotated[float, _option("How far the ratio may move.", panel=STEPS)]
Kl = Annotated[float, _option("Coefficient of the KL penalty; 0 for none.", panel=STEPS)]
TargetKl = Annotated[
    float, _option("KL per token above which the coefficient grows in proportion; 0 for never.", panel=STEPS)
]
MaxWords = Annotated[int, _option("Longest completion in tokens of text; memories do not count.", panel=STEPS)]
Temperature = Annotated[float, _option("Of sampling.", panel=STEPS)]
MaxInvocations = Annotated[
    int | None, _option("At most so many memories per trajectory. Default: the memory's own setting.", panel=MEMORY)
]
RowsPerRollout = Annotated[int, _option("Trajectories written at once by one process.", panel=RUN)]
RowsPerForward = Annotated[int, _option("Trajectories in one forward and backward: memory, not results.", panel=RUN)]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory, more time. Default: on a GPU.",
        rich_help_panel=RUN,
    ),
]
Dtype = Annotated[Literal["auto", "float32", "bfloat16"], _option("Of the base.", panel=RUN)]
Device = Annotated[Literal["cpu", "cuda"] | None, _option("Default: the GPU if there is one.", panel=RUN)]
Seed = Annotated[int, _option("Of initialisation, order and sampling.", panel=STEPS)]
LoggingSteps = Annotated[int, _option("A line every so many steps.", panel=RUN)]
SaveSteps = Annotated[int, _option("A checkpoint every so many steps.", panel=RUN)]
KeepCheckpoints = Annotated[int | None, _option("How many checkpoints to keep. Default: all.", panel=RUN)]
Resume = Annotated[bool, _option("Go on from the last whole checkpoint in --output-dir.", "--resume", panel=RUN)]
Overwrite = Annotated[bool, _option("Start anew; what is there is moved aside, not deleted.", "--overwrite", panel=RUN)]
ReportTo = Annotated[list[str] | None, _option("tensorboard, wandb, trackio; repeat for several.", panel=RUN)]


@with_examples(
    (
        "questions with images and answers, one JSON object per line",
        "keepsight train vismem-formation Qwen/Qwen2.5-VL-7B-Instruct -d questions.jsonl -o stage1",
    ),
    (
        "what our laboratory needed: a warm start and a cap on text states (not in the paper)",
        "... --warm-start-steps 300 --max-text-states 8",
    ),
    ("a reward of your own, in rewards.py here", "... --reward format --reward rewards:judge=0.9"),
    ("go on where a run stopped", "... --resume"),
    ("on eight GPUs", "accelerate launch --num_processes 8 -m keepsight.cli train vismem-formation ..."),
)
def formation(
    source: Annotated[
        str, typer.Argument(help="A VLM's folder or hub id, or keepsight/reference; or a VisMem adapter to go on from.")
    ],
    dataset: Data,
    output_dir: Output,
    reward: Rewards = None,
    split: Split = "train",
    text_only: TextOnly = "error",
    check: Check = "full",
    num_queries: Annotated[int, _option("K, queries that the query builder makes.", panel=MEMORY)] = 8,
    num_short: Annotated[int, _option("N_s, latents of a short-term memory.", panel=MEMORY)] = 8,
    num_long: Annotated[int, _option("N_l, latents of a long-term memory.", panel=MEMORY)] = 16,
    form: Annotated[
        Literal["literal", "incremental"],
        _option("literal: as published. incremental: an invocation costs only its own positions.", panel=MEMORY),
    ] = "literal",
    max_text_states: Annotated[
        int | None,
        _option(
            "Form memories from the latest so many text states only. Default: all, as the paper; with long outputs the "
            "long-term former then loses the image as the model does. The laboratory needed 8.",
            panel=MEMORY,
        ),
    ] = None,
    max_invocations: MaxInvocations = None,
    delimiter_share: Annotated[
        float, _option("For this share of the steps memory is invoked after delimiters only.", panel=MEMORY)
    ] = 0.5,
    delimiter_probability: Annotated[float, _option("Of an invocation after a delimiter, then.", panel=MEMORY)] = 0.25,
    anywhere_probability: Annotated[
        float, _option("Of an invocation after any token, from then on.", panel=MEMORY)
    ] = 0.03,
    warm_start_steps: Annotated[
        int,
        _option(
            "Steps of label-free latent distillation before stage I. Ours, not in the paper; without it stage I "
            "learned nothing of the image in our laboratory.",
            panel=MEMORY,
        ),
    ] = 0,
    warm_start_lr: Annotated[float, _option("Its peak learning rate.", panel=MEMORY)] = 3e-3,
    gain: Gain = "replay",
    epochs: Epochs = 2.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 8,
    group_size: GroupSize = 16,
    iterations: Iterations = 1,
    lr: Lr = 5e-5,
    warmup_ratio: Warmup = 0.2,
    scheduler: Scheduler = "cosine",
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    clip: Clip = 0.2,
    kl: Kl = 0.015,
    target_kl: TargetKl = 0.03,
    max_words: MaxWords = 512,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    rows_per_rollout: RowsPerRollout = 32,
    rows_per_forward: RowsPerForward = 4,
    gradient_checkpointing: Checkpointing = None,
    dtype: Dtype = "auto",
    device: Device = None,
    logging_steps: LoggingSteps = 1,
    save_steps: SaveSteps = 20,
    keep_checkpoints: KeepCheckpoints = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    report_to: ReportTo = None,
) -> None:
    """Stage I of VisMem: a latent memory learns what to remember, by reinforcement (GRPO).

    The policy is frozen. Memory is invoked at random, first after delimiters, later anywhere, and rewarded by what it
    adds to the score. Questions are "messages" and "images", or "prompt", "answer" and "image"; other columns go to the
    rewards. Everything is checked before the first step. Defaults are the paper's (batch 8, groups of 16, two epochs).
    """
    chosen = dict(locals())
    _quiet()
    from keepsight.train.vismem import FormationSettings, train_vismem_formation
    from keepsight.vismem import VisMemConfig

    asked = {"num_queries": 8, "num_short": 8, "num_long": 16, "form": "literal", "max_text_states": None}
    changed = {name: chosen[name] for name, usual in asked.items() if chosen[name] != usual}
    from keepsight.adapters import find_adapter

    config = VisMemConfig(**{name: chosen[name] for name in asked})
    if find_adapter(source) is not None:
        if changed:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise KeepsightError(f"{source} is an adapter, whose memory has its sizes already; leave {names} out.")
        config = None  # type: ignore[assignment]
    settings = _settings(FormationSettings, chosen)
    _run(train_vismem_formation, chosen, settings, vismem=config)


@with_examples(
    (
        "the folder that stage I wrote",
        "keepsight train vismem-invocation stage1 -d questions.jsonl -o stage2",
    ),
    ("so that a memory that never harms is not invoked always (not in the paper)", "... --invocation-cost 0.05"),
    ("train more of the policy than the tokens' rows", "... --train lora"),
)
def invocation(
    source: Annotated[str, typer.Argument(help="The adapter that stage I made.")],
    dataset: Data,
    output_dir: Output,
    reward: Rewards = None,
    split: Split = "train",
    text_only: TextOnly = "error",
    check: Check = "full",
    train: Annotated[
        Literal["tokens", "lora"],
        _option(
            "What of the policy: the special tokens' rows; or those and a LoRA on the language model.", panel=STEPS
        ),
    ] = "tokens",
    lora_rank: Annotated[int, _option("Of the policy's LoRA.", panel=STEPS)] = 16,
    lora_alpha: Annotated[float, _option("Of the policy's LoRA.", panel=STEPS)] = 32,
    max_invocations: MaxInvocations = None,
    alpha: Annotated[
        float, _option("Strength of the penalties p_type and p_neg (the paper gives none).", panel=REWARD)
    ] = 0.3,
    invocation_cost: Annotated[
        float,
        _option(
            "Subtracted per invocation. Ours; the paper's is 0, with which our laboratory learned to invoke always.",
            panel=REWARD,
        ),
    ] = 0.0,
    start_bias: Annotated[
        float, _option("Added to the invocation tokens' logits at the start, where they are too rare.", panel=MEMORY)
    ] = 0.0,
    gain: Gain = "replay",
    epochs: Epochs = 2.0,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 8,
    group_size: GroupSize = 16,
    iterations: Iterations = 1,
    lr: Lr = 5e-5,
    end_lr: Annotated[float | None, _option("Of the end tokens' rows. Default: a tenth of --lr.", panel=STEPS)] = None,
    warmup_ratio: Warmup = 0.2,
    scheduler: Scheduler = "cosine",
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    clip: Clip = 0.2,
    kl: Kl = 0.015,
    target_kl: TargetKl = 0.03,
    max_words: MaxWords = 512,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    rows_per_rollout: RowsPerRollout = 32,
    rows_per_forward: RowsPerForward = 4,
    gradient_checkpointing: Checkpointing = None,
    dtype: Dtype = "auto",
    device: Device = None,
    logging_steps: LoggingSteps = 1,
    save_steps: SaveSteps = 20,
    keep_checkpoints: KeepCheckpoints = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    report_to: ReportTo = None,
) -> None:
    """Stage II of VisMem: the policy learns when to invoke which memory, by reinforcement (GRPO).

    The memory is frozen; the special tokens' rows are trained. Rewarded is what memory adds to the score, less the
    penalties for the wrong type and for invocations that did not pay, and, if asked for, a cost per invocation.
    """
    chosen = dict(locals())
    _quiet()
    from keepsight.train.vismem import InvocationSettings, train_vismem_invocation

    _run(train_vismem_invocation, chosen, _settings(InvocationSettings, chosen))


def _quiet() -> None:
    if not debugging():
        quiet()


def _settings(kind: type, chosen: dict[str, Any]) -> Any:
    from dataclasses import fields

    values = {f.name: chosen[f.name] for f in fields(kind) if f.name in chosen}
    values |= {"report_to": tuple(chosen["report_to"] or ()), "target_kl": chosen["target_kl"] or None}
    return kind(**values)


def _run(function: Callable[..., Any], chosen: dict[str, Any], settings: Any, **more: Any) -> None:
    from keepsight.cli.train import _CheckProgress, _how_to_go_on, _nothing
    from keepsight.train.rewards import DEFAULT_REWARDS

    if chosen["resume"] and chosen["overwrite"]:
        raise KeepsightError("--resume goes on with a run and --overwrite starts anew; give one of them.")
    first = os.environ.get("RANK", "0") == "0"  # of several processes, one talks
    try:
        report = function(
            chosen["source"],
            chosen["dataset"],
            chosen["output_dir"],
            rewards=chosen["reward"] or DEFAULT_REWARDS,
            settings=settings,
            split=chosen["split"],
            text_only=chosen["text_only"],
            check=chosen["check"],
            resume=chosen["resume"],
            overwrite=chosen["overwrite"],
            say=say if first else _nothing,
            on_log=_print_log,
            on_check=_CheckProgress() if first else None,
            **more,
        )
    except KeyboardInterrupt as stop:
        raise Interrupted(_how_to_go_on(chosen["output_dir"])) from stop
    if first:
        _print_report(report)


def _print_log(values: dict[str, float], step: int, total: int) -> None:
    """One line per logging step."""
    parts = [f"step {step:>{len(str(total))}}/{total}", f"loss {values['loss']:+.4f}", f"reward {values['reward']:.3f}"]
    parts += [f"{name} {values[name]:+.3f}" for name in ("dS", "p_type", "p_neg") if name in values]
    parts.append(f"std {values['group_std']:.3f}")
    if "kl" in values:
        parts.append(f"KL {values['kl']:.4f}")
    parts.append(f"invoked short {values['invocations/short']:.2f} long {values['invocations/long']:.2f}")
    norms = {n.partition("/")[2]: v for n, v in values.items() if n.startswith("gradient_norm/")}
    parts.append("gradients " + " ".join(f"{name} {value:.1e}" for name, value in norms.items()))
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if "gpu_memory_gb" in values:
        parts.append(f"{values['gpu_memory_gb']:.1f} GB")
    say("  ".join(parts))


def _print_report(report: Any) -> None:
    from rich.table import Table

    table = Table(title=f"VisMem, {report.stage}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    resumed = f", resumed at {report.resumed_from}" if report.resumed_from is not None else ""
    table.add_row("steps", f"{report.steps}{resumed}, {report.seconds:.1f} s")
    table.add_row("tokens", f"{report.tokens_generated:,} written, {report.tokens_trained:,} trained on")
    if report.first:
        table.add_row("reward", f"{report.first['reward']:.4f} at first, {report.last['reward']:.4f} at last")
    table.add_row("trained", f"{report.trained:,} parameters; {report.changed} tensors changed")
    table.add_row("all else", f"{report.untouched} tensors; no bit changed (digests before and after)")
    table.add_row("KL against", report.reference)
    if report.data.skipped:
        table.add_row("skipped", f"{len(report.data.skipped)} of {report.data.rows + len(report.data.skipped)} samples")
    table.add_row("adapter", str(report.output_dir))
    following = {
        "formation": f"keepsight train vismem-invocation {report.output_dir} -d ... -o ...",
        "invocation": f"keepsight generate {report.output_dir} --image FILE --prompt TEXT",
    }
    table.add_row("next", following[report.stage])
    out.print(table, markup=False)
