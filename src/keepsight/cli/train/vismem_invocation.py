"""`keepsight train vismem-invocation`: stage II of a latent vision memory, when to remember."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from keepsight.cli.common.console import quiet, with_examples
from keepsight.cli.train.options import VisMemTrainOptions
from keepsight.cli.train.showing import print_vismem_log, print_vismem_report, run_and_report, show_vismem_dry_run
from keepsight.train.vismem.settings import InvocationSettings


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
    job: VisMemTrainOptions,
    settings: InvocationSettings,
) -> None:
    """Stage II of VisMem: the policy learns when to invoke which memory, by reinforcement (GRPO).

    The memory is frozen; the special tokens' rows are trained. Rewarded is what memory adds to the score, less the
    penalties for the wrong type and for invocations that did not pay, and, if asked for, a cost per invocation.
    """
    quiet()
    job.warn_of_idle(settings)
    if job.dry_run:
        return show_vismem_dry_run(source, settings, None, job)
    from keepsight.train.vismem.train import train_vismem_invocation

    train = partial(train_vismem_invocation, rewards=job.rewards, text_only=job.text_only, settings=settings)
    return run_and_report(train, source, job, print_vismem_log, print_vismem_report)
