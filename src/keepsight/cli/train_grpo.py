"""`keepsight train pvm-grpo`: refine a memory together with its language model, by reinforcement."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from keepsight.cli import train_options as ask
from keepsight.cli.console import debugging, quiet, with_examples
from keepsight.errors import KeepsightError

REWARD = "Rollouts and rewards"


@with_examples(
    (
        "refine what `keepsight train pvm` has made, on questions with answers",
        "keepsight train pvm-grpo my-memory -d questions.jsonl -o my-refined-memory",
    ),
    (
        "one GPU: a LoRA on the language model instead of all of it",
        "keepsight train pvm-grpo my-memory -d questions.jsonl -o refined --policy lora --rollout-batch 8",
    ),
    ("will it fit? (no weights are read)", "keepsight train pvm-grpo my-memory --dry-run --policy lora"),
    (
        "a reward of your own beside the paper's: def brevity(completions, **columns) in my_rewards.py",
        "keepsight train pvm-grpo ... --reward format --reward answer --reward my_rewards:brevity=0.1",
    ),
    ("what is the memory's part in it?", "keepsight train pvm-grpo ... --control sft,lora,none"),
)
def pvm_grpo(
    source: Annotated[
        str, typer.Argument(help="A trained memory (the paper's way), or a plain VLM that gets a new one.")
    ],
    dataset: ask.Data = None,
    output_dir: ask.Output = None,
    eval_dataset: ask.EvalData = None,
    eval_split: ask.EvalSplit = None,
    split: ask.Split = "train",
    text_only: ask.TextOnly = "error",
    max_length: Annotated[
        int | None, ask.option("Longest prompt in tokens, images included. Default: no limit.", panel=ask.DATA)
    ] = None,
    over_long: Annotated[
        Literal["error", "skip"], ask.option("What to do with longer ones.", panel=ask.DATA)
    ] = "error",
    check: ask.Check = "full",
    policy: Annotated[
        Literal["full", "lora", "none"],
        ask.option(
            "What learns beside the memory: the whole language model (paper), a LoRA on it, or nothing (both ours).",
            panel=ask.MEMORY,
        ),
    ] = "full",
    lora_rank: Annotated[int, ask.option("Of --policy lora.", panel=ask.MEMORY)] = 16,
    layers: ask.Layers = None,
    width: ask.Width = None,
    causal: ask.Causal = True,
    reward: Annotated[
        list[str] | None,
        ask.option(
            "format, answer, match, or package.module:function, with =WEIGHT behind it; repeat for several. Default: "
            "format (0.1) and answer (0.9).",
            panel=REWARD,
        ),
    ] = None,
    completions: Annotated[int, ask.option("Of each prompt, compared with each other.", panel=REWARD)] = 8,
    max_new_tokens: Annotated[int, ask.option("Longest completion.", panel=REWARD)] = 16_384,
    temperature: Annotated[float, ask.option("Of sampling.", panel=REWARD)] = 1.0,
    top_p: Annotated[float, ask.option("Of sampling.", panel=REWARD)] = 1.0,
    kl: Annotated[float, ask.option("Coefficient of the divergence from the start.", panel=REWARD)] = 0.0,
    mask_truncated: Annotated[
        bool,
        ask.option(
            "Completions that were cut off teach nothing.", "--mask-truncated/--no-mask-truncated", panel=REWARD
        ),
    ] = True,
    rollout_batch: Annotated[
        int | None, ask.option("Completions a device writes at a time. Default: all of a step.", panel=REWARD)
    ] = None,
    epochs: ask.Epochs = 1.0,
    max_steps: ask.MaxSteps = None,
    batch_size: Annotated[int, ask.option("Completions per device and forward.", panel=ask.STEPS)] = 8,
    grad_accum: ask.GradAccum = 8,
    lr: ask.Lr = 1e-6,
    gate_lr_multiplier: ask.GateLr = 1.0,
    warmup_ratio: ask.Warmup = 0.0,
    scheduler: ask.Scheduler = "constant",
    weight_decay: ask.WeightDecay = 0.0,
    max_grad_norm: ask.MaxGradNorm = 1.0,
    seed: ask.Seed = 0,
    bf16: ask.Bf16 = None,
    gradient_checkpointing: ask.Checkpointing = None,
    dtype: ask.Dtype = "auto",
    load_in_4bit: ask.FourBit = False,
    device: ask.Device = None,
    logging_steps: ask.LoggingSteps = 1,
    save_steps: ask.SaveSteps = 50,
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
    """Refine a persistent visual memory and its language model by GRPO (through TRL).

    Samples are questions: "prompt", "answer" and "image", or "messages" and "images"; other columns go to the rewards.
    The model answers each several times, and what was rewarded above its own average becomes more likely. The vision
    encoder stays frozen. Defaults follow the PVM paper's second stage: 64 completions per step on one device.
    """
    chosen = dict(locals())
    if not debugging():
        quiet()
    from keepsight.pvm import PvmConfig
    from keepsight.train.pvm.grpo import GrpoSettings, train_pvm_grpo
    from keepsight.train.rewards.rewards import DEFAULT_REWARDS
    from keepsight.train.run.controls import parse_controls

    settings = ask.settings_of(GrpoSettings, chosen, rewards=tuple(reward or DEFAULT_REWARDS))
    if policy != "lora" and lora_rank != 16:
        raise KeepsightError(f"--lora-rank has no effect with --policy {policy}; it is for --policy lora.")
    given = layers is not None or width is not None or not causal
    memory = PvmConfig(layers=ask.parse_layers(layers), width=width, causal=causal) if given else None
    ask.warn_of_idle(chosen)
    if dry_run:
        return ask.show_dry_run(source, settings, memory, dataset, split, tokens, policy, lora_rank)
    dataset, output_dir = ask.check_choices(resume, overwrite, dataset, output_dir)
    train = partial(
        train_pvm_grpo,
        source,
        dataset,
        output_dir,
        policy=policy,
        lora_rank=lora_rank,
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
