"""`keepsight train`: one command for each stage of each method, and what runs have cost."""

from __future__ import annotations

import typer

from keepsight.cli.options import settings_command
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


settings_command(train_app, "pvm", pvm)
settings_command(train_app, "pvm-grpo", pvm_grpo)
settings_command(train_app, "vismem-formation", formation)
settings_command(train_app, "vismem-invocation", invocation)
train_app.command("cost")(cost)
