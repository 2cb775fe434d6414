"""`keepsight train`: one command for each stage of each method, and what runs have cost."""

from __future__ import annotations

from typing import Annotated

import typer

from keepsight.cli import train_grpo, train_pvm, train_vismem
from keepsight.cli.console import out, with_examples

train_app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True)


@train_app.callback()
def _train() -> None:
    """Teach a memory on your images and conversations, or on questions whose answers can be checked.

    Every command checks data, settings and folder before the first step, can be killed and resumed, and tells with
    --dry-run what it needs.
    """


@with_examples(
    ("one run, or several side by side", "keepsight train cost sft-memory refined-memory"),
    (
        "what do two stages of reinforcement cost against supervised fine-tuning?",
        'keepsight train cost my-memory "two RL stages=vismem-stage1+vismem-stage2"',
    ),
)
def cost(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs; or NAME=FOLDER+FOLDER for a sum of several.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a markdown table.")] = False,
) -> None:
    """What training runs have cost: operations, tokens, time and memory, side by side."""
    from keepsight.train.cost import accounting

    if markdown:
        print(accounting.markdown(runs), end="")
    else:
        out.print(accounting.table(runs), markup=False)


train_app.command("pvm")(train_pvm.pvm)
train_app.command("pvm-grpo")(train_grpo.pvm_grpo)
train_app.command("vismem-formation")(train_vismem.formation)
train_app.command("vismem-invocation")(train_vismem.invocation)
train_app.command("cost")(cost)
