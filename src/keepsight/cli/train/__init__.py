"""`keepsight train`: one command for each stage of each method, and what runs have cost."""

from __future__ import annotations

import typer

from keepsight.cli.common.options import Command, settings_options
from keepsight.cli.train.cost import cost
from keepsight.cli.train.pvm import pvm
from keepsight.cli.train.pvm_grpo import pvm_grpo
from keepsight.cli.train.vismem_formation import formation
from keepsight.cli.train.vismem_invocation import invocation

train_app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, no_args_is_help=True)


@train_app.callback()
def _train() -> None:
    """Teach a memory on your images and conversations, or on questions whose answers can be checked.

    Every command checks data, settings and folder before the first step, can be killed and resumed, and tells with
    --dry-run what it needs.
    """


train_app.command("pvm", cls=Command)(settings_options(pvm))
train_app.command("pvm-grpo", cls=Command)(settings_options(pvm_grpo))
train_app.command("vismem-formation", cls=Command)(settings_options(formation))
train_app.command("vismem-invocation", cls=Command)(settings_options(invocation))
train_app.command("cost", cls=Command)(cost)
