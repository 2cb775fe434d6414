"""`keepsight train cost`: what training runs have cost, side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from keepsight.cli.common.console import out, with_examples


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
    from keepsight.train.run import accounting

    if markdown:
        print(accounting.markdown(runs), end="")
    else:
        out.print(accounting.table(runs), markup=False)
