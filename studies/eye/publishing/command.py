"""`python -m studies eye publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keepsight.cli.common.console import out, quiet, say, with_examples
from studies.eye.options import RESULTS, WORK, Made, Published, Results, Work, folder_of


@with_examples(
    ("after the gate, whose figures go into the card", "python -m studies eye publish --to my-eye"),
    ("the card of a published eye again", "python -m studies eye publish --eye my-eye --to my-eye"),
)
def publish_eye(
    to: Annotated[Path | None, typer.Option(help="Folder to write. Default: published/SIZE in --work.")] = None,
    size: Made = None,
    eye: Published = None,
    work: Work = WORK,
    results: Results = RESULTS,
) -> None:
    """Put the eye and a model card into a folder that others can be given; nothing is sent anywhere."""
    quiet()
    from studies.eye.publishing.eye import about_eye
    from studies.eye.publishing.publish import publish

    folder = folder_of(work, size, eye)
    to = to or work / "published" / about_eye(folder)["size"]
    if not publish(folder, results, to):
        say("the card says that nothing was measured: there is no result of the gate of this very eye. Next:")
        say(f"python -m studies eye gate --eye {to}, then publish again")
    out.print(str(to), highlight=False, markup=False, soft_wrap=True)
