"""`keepsight train pvm-grpo`: refine a memory together with its language model, by reinforcement."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Literal

import typer

from keepsight.cli.common.console import quiet, with_examples
from keepsight.cli.common.options import is_default
from keepsight.cli.train.options import PvmOptions, TrainOptions
from keepsight.cli.train.showing import print_log, print_report, run_and_report, show_dry_run
from keepsight.errors import KeepsightError
from keepsight.serve.vllm.rollouts import VllmRollouts
from keepsight.train.run.fields import MEMORY, setting, setting_of
from keepsight.train.run.settings import GrpoSettings


@dataclass(frozen=True, kw_only=True)
class Learning(PvmOptions):
    """What learns: the memory, and what is beside it."""

    policy: Literal["full", "lora", "none"] = setting(
        "full",
        "What learns beside the memory: the whole language model (paper), a LoRA on it, or nothing (both ours).",
        MEMORY,
    )
    lora_rank: int = setting(16, "Of --policy lora.", MEMORY)


@with_examples(
    (
        "refine what `keepsight train pvm` has made, on questions with answers",
        "keepsight train pvm-grpo my-memory -d questions.jsonl -o my-refined-memory",
    ),
    (
        "one GPU: a LoRA on the language model instead of all of it",
        "keepsight train pvm-grpo my-memory -d questions.jsonl -o refined --policy lora --rows-per-rollout 8",
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
    job: TrainOptions,
    memory: Learning,
    settings: GrpoSettings,
    rollouts: VllmRollouts,
) -> None:
    """Refine a persistent visual memory and its language model by GRPO (through TRL).

    Samples are questions: "prompt", "answer" and "image", or "messages" and "images"; other columns go to the rewards.
    The model answers each several times, and what was rewarded above its own average becomes more likely. The vision
    encoder stays frozen. Defaults follow the PVM paper's second stage: 64 completions per step on one device.
    """
    quiet()
    if memory.policy != "lora" and not is_default(memory, "lora_rank"):
        raise KeepsightError(f"--lora-rank has no effect with --policy {memory.policy}; it is for --policy lora.")
    given = [item.name for item in fields(rollouts) if setting_of(item) and not is_default(rollouts, item.name)]
    if given and not rollouts.use_vllm:
        raise KeepsightError(f"--{given[0].replace('_', '-')} has no effect without --use-vllm.")
    config = memory.given()
    job.warn_of_idle(settings)
    if job.dry_run:
        return show_dry_run(source, settings, config, job, memory.policy, memory.lora_rank)
    from keepsight.train.pvm.grpo import train_pvm_grpo

    train = partial(train_pvm_grpo, pvm=config, policy=memory.policy, lora_rank=memory.lora_rank, settings=settings)
    if rollouts.use_vllm:
        train = partial(train, writer=rollouts)
    return run_and_report(train, source, job, print_log, print_report)
