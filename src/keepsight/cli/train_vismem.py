"""`keepsight train vismem-formation` and `vismem-invocation`: the two stages of a latent vision memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from keepsight.cli import train_options as ask
from keepsight.cli.console import Interrupted, debugging, out, quiet, say, with_examples
from keepsight.cli.train_options import option
from keepsight.errors import KeepsightError

REWARD = "Rollouts and rewards"

# What both stages ask beside what every training command asks. Defaults, with their sources, are in the settings.
Rewards = Annotated[
    list[str] | None,
    option(
        "format, answer, match, or package.module:function, with =WEIGHT behind it; repeat for several. Default: "
        "format (0.1) and answer (0.9).",
        "--reward",
        panel=REWARD,
    ),
]
TextOnly = Annotated[
    Literal["error", "skip", "keep"],
    option("What to do with samples without an image (they have long-term memory only).", panel=ask.DATA),
]
Gain = Annotated[
    Literal["replay", "score"],
    option(
        "replay: the paper's dS, score minus that of the same beginning continued without memory. score: the score "
        "alone, which saves those rollouts (ours).",
        panel=REWARD,
    ),
]
Controls = Annotated[
    list[str] | None,
    option(
        "Then train the same without the memory, and set both side by side: lora (as many parameters as the memory), "
        "sft (the whole language model), none (the base), several with commas; sft=1e-5 for a rate of its own.",
        "--control",
        panel=ask.RUN,
    ),
]
BatchSize = Annotated[int, option("Questions per step, all processes together.", panel=ask.STEPS)]
GroupSize = Annotated[int, option("Trajectories per question.", panel=REWARD)]
Iterations = Annotated[int, option("Optimiser steps per batch of trajectories.", panel=ask.STEPS)]
Scheduler = Annotated[Literal["cosine", "linear", "constant"], option("How the rate falls.", panel=ask.STEPS)]
Clip = Annotated[float, option("How far the ratio may move.", panel=ask.STEPS)]
Kl = Annotated[float, option("Coefficient of the KL penalty; 0 for none.", panel=ask.STEPS)]
TargetKl = Annotated[
    float, option("KL per token above which the coefficient grows in proportion; 0 for never.", panel=ask.STEPS)
]
MaxWords = Annotated[int, option("Longest completion in tokens of text; memories do not count.", panel=REWARD)]
Temperature = Annotated[float, option("Of sampling.", panel=REWARD)]
MaxInvocations = Annotated[
    int | None, option("At most so many memories per trajectory. Default: the memory's own setting.", panel=REWARD)
]
RowsPerRollout = Annotated[int, option("Trajectories written at once by one process.", panel=ask.RUN)]
RowsPerForward = Annotated[int, option("Trajectories in one forward and backward: memory, not results.", panel=ask.RUN)]


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
    ("is it better than training a LoRA of its size on the same questions?", "... --control lora,none"),
    ("will it fit? (no weights are read)", "... --dry-run"),
    ("go on where a run stopped", "... --resume"),
    ("on eight GPUs", "accelerate launch --num_processes 8 -m keepsight.cli train vismem-formation ..."),
)
def formation(
    source: Annotated[
        str, typer.Argument(help="A VLM's folder or hub id, or keepsight/reference; or a VisMem adapter to go on from.")
    ],
    dataset: ask.Data = None,
    output_dir: ask.Output = None,
    reward: Rewards = None,
    split: ask.Split = "train",
    eval_dataset: ask.EvalData = None,
    eval_split: ask.EvalSplit = None,
    text_only: TextOnly = "error",
    check: ask.Check = "full",
    num_queries: Annotated[int, option("K, queries that the query builder makes.", panel=ask.MEMORY)] = 8,
    num_short: Annotated[int, option("N_s, latents of a short-term memory.", panel=ask.MEMORY)] = 8,
    num_long: Annotated[int, option("N_l, latents of a long-term memory.", panel=ask.MEMORY)] = 16,
    form: Annotated[
        Literal["literal", "incremental"],
        option("literal: as published. incremental: an invocation costs only its own positions.", panel=ask.MEMORY),
    ] = "literal",
    max_text_states: Annotated[
        int | None,
        option(
            "Form memories from the latest so many text states only. Default: all, as the paper; with long outputs the "
            "long-term former then loses the image as the model does. The laboratory needed 8.",
            panel=ask.MEMORY,
        ),
    ] = None,
    max_invocations: MaxInvocations = None,
    delimiter_share: Annotated[
        float, option("For this share of the steps memory is invoked after delimiters only.", panel=ask.MEMORY)
    ] = 0.5,
    delimiter_probability: Annotated[float, option("Of an invocation there.", panel=ask.MEMORY)] = 0.25,
    anywhere_probability: Annotated[
        float, option("Of an invocation after any token, from then on.", panel=ask.MEMORY)
    ] = 0.03,
    warm_start_steps: Annotated[
        int,
        option(
            "Steps of label-free latent distillation before stage I. Ours, not in the paper; without it stage I "
            "learned nothing of the image in our laboratory.",
            panel=ask.MEMORY,
        ),
    ] = 0,
    warm_start_lr: Annotated[float, option("Its peak learning rate.", panel=ask.MEMORY)] = 3e-3,
    gain: Gain = "replay",
    epochs: ask.Epochs = 2.0,
    max_steps: ask.MaxSteps = None,
    batch_size: BatchSize = 8,
    group_size: GroupSize = 16,
    iterations: Iterations = 1,
    lr: ask.Lr = 5e-5,
    warmup_ratio: ask.Warmup = 0.2,
    scheduler: Scheduler = "cosine",
    weight_decay: ask.WeightDecay = 0.0,
    max_grad_norm: ask.MaxGradNorm = 1.0,
    clip: Clip = 0.2,
    kl: Kl = 0.015,
    target_kl: TargetKl = 0.03,
    max_words: MaxWords = 512,
    temperature: Temperature = 1.0,
    seed: ask.Seed = 0,
    rows_per_rollout: RowsPerRollout = 32,
    rows_per_forward: RowsPerForward = 4,
    gradient_checkpointing: ask.Checkpointing = None,
    dtype: ask.Dtype = "auto",
    load_in_4bit: ask.FourBit = False,
    device: ask.Device = None,
    logging_steps: ask.LoggingSteps = 1,
    save_steps: ask.SaveSteps = 20,
    keep_checkpoints: ask.KeepCheckpoints = None,
    resume: ask.Resume = False,
    overwrite: ask.Overwrite = False,
    control: Controls = None,
    dry_run: ask.DryRun = False,
    tokens: ask.Tokens = None,
    report_to: ask.ReportTo = None,
) -> None:
    """Stage I of VisMem: a latent memory learns what to remember, by reinforcement (GRPO).

    The policy is frozen. Memory is invoked at random, first after delimiters, later anywhere, and rewarded by what it
    adds to the score. Questions are "messages" and "images", or "prompt", "answer" and "image"; other columns go to the
    rewards. Everything is checked before the first step. Defaults are the paper's (batch 8, groups of 16, two epochs).
    """
    chosen = dict(locals())
    _quiet()
    from keepsight.train.vismem.train import FormationSettings, train_vismem_formation
    from keepsight.vismem import VisMemConfig

    asked = {"num_queries": 8, "num_short": 8, "num_long": 16, "form": "literal", "max_text_states": None}
    changed = {name: chosen[name] for name, usual in asked.items() if chosen[name] != usual}
    from keepsight.checkpoints.adapters import find_adapter

    config = VisMemConfig(**{name: chosen[name] for name in asked})
    if find_adapter(source) is not None:
        if changed:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise KeepsightError(f"{source} is an adapter, whose memory has its sizes already; leave {names} out.")
        config = None  # type: ignore[assignment]
    settings = ask.settings_of(FormationSettings, chosen, target_kl=target_kl or None)
    ask.warn_of_idle(chosen)
    if dry_run:
        return _dry_run(chosen, settings, config)
    _run(train_vismem_formation, chosen, settings, vismem=config)
    return None


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
    dataset: ask.Data = None,
    output_dir: ask.Output = None,
    reward: Rewards = None,
    split: ask.Split = "train",
    eval_dataset: ask.EvalData = None,
    eval_split: ask.EvalSplit = None,
    text_only: TextOnly = "error",
    check: ask.Check = "full",
    train: Annotated[
        Literal["tokens", "lora"],
        option(
            "What of the policy: the special tokens' rows; or those and a LoRA on the language model.", panel=ask.STEPS
        ),
    ] = "tokens",
    lora_rank: Annotated[int, option("Of the policy's LoRA.", panel=ask.STEPS)] = 16,
    lora_alpha: Annotated[float, option("Of the policy's LoRA.", panel=ask.STEPS)] = 32,
    max_invocations: MaxInvocations = None,
    alpha: Annotated[
        float, option("Strength of the penalties p_type and p_neg (the paper gives none).", panel=REWARD)
    ] = 0.3,
    invocation_cost: Annotated[
        float,
        option(
            "Subtracted per invocation. Ours; the paper's is 0, with which our laboratory learned to invoke always.",
            panel=REWARD,
        ),
    ] = 0.0,
    start_bias: Annotated[
        float, option("Added to the invocation tokens' logits at the start, where they are too rare.", panel=ask.MEMORY)
    ] = 0.0,
    gain: Gain = "replay",
    epochs: ask.Epochs = 2.0,
    max_steps: ask.MaxSteps = None,
    batch_size: BatchSize = 8,
    group_size: GroupSize = 16,
    iterations: Iterations = 1,
    lr: ask.Lr = 5e-5,
    end_lr: Annotated[float | None, option("Of the end tokens. Default: a tenth of --lr.", panel=ask.STEPS)] = None,
    warmup_ratio: ask.Warmup = 0.2,
    scheduler: Scheduler = "cosine",
    weight_decay: ask.WeightDecay = 0.0,
    max_grad_norm: ask.MaxGradNorm = 1.0,
    clip: Clip = 0.2,
    kl: Kl = 0.015,
    target_kl: TargetKl = 0.03,
    max_words: MaxWords = 512,
    temperature: Temperature = 1.0,
    seed: ask.Seed = 0,
    rows_per_rollout: RowsPerRollout = 32,
    rows_per_forward: RowsPerForward = 4,
    gradient_checkpointing: ask.Checkpointing = None,
    dtype: ask.Dtype = "auto",
    load_in_4bit: ask.FourBit = False,
    device: ask.Device = None,
    logging_steps: ask.LoggingSteps = 1,
    save_steps: ask.SaveSteps = 20,
    keep_checkpoints: ask.KeepCheckpoints = None,
    resume: ask.Resume = False,
    overwrite: ask.Overwrite = False,
    control: Controls = None,
    dry_run: ask.DryRun = False,
    tokens: ask.Tokens = None,
    report_to: ask.ReportTo = None,
) -> None:
    """Stage II of VisMem: the policy learns when to invoke which memory, by reinforcement (GRPO).

    The memory is frozen; the special tokens' rows are trained. Rewarded is what memory adds to the score, less the
    penalties for the wrong type and for invocations that did not pay, and, if asked for, a cost per invocation.
    """
    chosen = dict(locals())
    _quiet()
    from keepsight.train.vismem.train import InvocationSettings, train_vismem_invocation

    settings = ask.settings_of(InvocationSettings, chosen, target_kl=target_kl or None)
    ask.warn_of_idle(chosen)
    if dry_run:
        return _dry_run(chosen, settings, None)
    _run(train_vismem_invocation, chosen, settings)
    return None


def _quiet() -> None:
    if not debugging():
        quiet()


def _run(function: Callable[..., Any], chosen: dict[str, Any], settings: Any, **more: Any) -> None:
    from keepsight.train.rewards.rewards import DEFAULT_REWARDS
    from keepsight.train.run.controls import parse_controls
    from keepsight.train.run.preflight import silent

    dataset, folder = ask.check_choices(chosen["resume"], chosen["overwrite"], chosen["dataset"], chosen["output_dir"])
    first = ask.is_first()
    try:
        report = function(
            chosen["source"],
            dataset,
            folder,
            rewards=chosen["reward"] or DEFAULT_REWARDS,
            settings=settings,
            **{name: chosen[name] for name in ("split", "eval_dataset", "eval_split", "text_only", "check")},
            **{name: chosen[name] for name in ("resume", "overwrite")},
            controls=parse_controls(chosen["control"] or ()),
            say=say if first else silent,
            on_log=_print_log,
            on_check=ask.CheckProgress() if first else None,
            **more,
        )
    except KeyboardInterrupt as stop:
        raise Interrupted(ask.how_to_go_on(folder)) from stop
    if first:
        _print_report(report)


def _dry_run(chosen: dict[str, Any], settings: Any, config: Any) -> None:
    from keepsight.train.cost.dry_run import DEFAULT_TOKENS, measured, print_dry_run
    from keepsight.train.vismem.dry_run import dry_run_vismem

    source, length, visual = chosen["source"], chosen["tokens"] or DEFAULT_TOKENS, None
    if chosen["tokens"] is None and chosen["dataset"] is not None:
        length, visual = measured(source, chosen["dataset"], chosen["split"], answers=False)
    found = dry_run_vismem(source, settings, config, length=length, visual=visual)
    out.print(print_dry_run(found), markup=False)


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
    for name, value in (report.metrics or {}).items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    table.add_row("cost", f"{report.cost.flops / 1e15:.4g} PFLOP by its shapes")
    if report.data.skipped:
        table.add_row("skipped", f"{len(report.data.skipped)} of {report.data.rows + len(report.data.skipped)} samples")
    table.add_row("adapter", str(report.output_dir))
    following = {
        "formation": f"keepsight train vismem-invocation {report.output_dir} -d ... -o ...",
        "invocation": f"keepsight generate {report.output_dir} --image FILE --prompt TEXT",
    }
    table.add_row("next", following[report.stage])
    out.print(table, markup=False)
    if report.comparison is not None:
        out.print(report.comparison.table(), markup=False)
