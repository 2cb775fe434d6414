"""`keepsight train vismem-formation`: stage I of a latent vision memory, what to remember."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from keepsight.cli.common.console import quiet, with_examples
from keepsight.cli.common.options import is_default
from keepsight.cli.train.options import VisMemOptions, VisMemTrainOptions
from keepsight.cli.train.showing import print_vismem_log, print_vismem_report, run_and_report, show_vismem_dry_run
from keepsight.errors import KeepsightError
from keepsight.train.vismem.settings import FormationSettings


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
    job: VisMemTrainOptions,
    memory: VisMemOptions,
    settings: FormationSettings,
) -> None:
    """Stage I of VisMem: a latent memory learns what to remember, by reinforcement (GRPO).

    The policy is frozen. Memory is invoked at random, first after delimiters, later anywhere, and rewarded by what it
    adds to the score. Questions are "messages" and "images", or "prompt", "answer" and "image"; other columns go to the
    rewards. Everything is checked before the first step. Defaults are the paper's (batch 8, groups of 16, two epochs).
    """
    quiet()
    from keepsight.checkpoints.adapters import find_adapter

    config = memory.config()
    if find_adapter(source) is not None:
        changed = [f"--{name.replace('_', '-')}" for name in vars(memory) if not is_default(memory, name)]
        if changed:
            names = ", ".join(changed)
            raise KeepsightError(f"{source} is an adapter, whose memory has its sizes already; leave {names} out.")
        config = None
    job.warn_of_idle(settings)
    if job.dry_run:
        return show_vismem_dry_run(source, settings, config, job)
    from keepsight.train.vismem.train import train_vismem_formation

    train = partial(
        train_vismem_formation, vismem=config, rewards=job.rewards, text_only=job.text_only, settings=settings
    )
    return run_and_report(train, source, job, print_vismem_log, print_vismem_report)
