"""The command line: `keepsight`, one file per command.

The table below is all that starting up reads; a command's file is imported when the command is called, so that help is
quick and a missing extra concerns only the command that needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

#: command -> (module, attribute, one line of help, panel)
COMMANDS = {
    name: (f"keepsight.cli.{name}", attribute, line, panel)
    for name, attribute, line, panel in (
        ("demo", "demo", "See a VLM lose its image and get it back: measured here, in minutes.", "Start"),
        ("generate", "generate", "Ask a model about images, with or without its memory.", "Use"),
        ("chat", "chat", "A page to try a model on, memory on and off side by side.", "Use"),
        ("serve", "serve", "Answer OpenAI clients, images and streaming included.", "Use"),
        ("diagnose", "diagnose", "Does a model lose its image? Is its memory really used?", "Use"),
        ("eval", "evaluate", "Questions with known answers: memory on and off side by side.", "Use"),
        ("info", "info", "What is in an adapter, or what memory a model would get.", "Use"),
        ("data", "data_app", "Is a dataset good for training? What is wrong with it?", "Make"),
        ("train", "train_app", "Teach a memory on your images and conversations.", "Make"),
        ("convert", "convert", "Turn a checkpoint in the PVM authors' layout into base + adapter.", "Make"),
        ("export", "export_app", "Make a folder that vLLM serves, memory and all.", "Serve"),
        ("lab", "lab_app", "The small reference VLM that the demo runs on, from nothing.", "Make"),
    )
}

HELP = """[bold]keepsight gives a vision-language model a memory for what it sees.[/bold]

A VLM reads an image once; the longer its answer grows, the less it looks back. keepsight adds a small branch beside \
some layers that looks at the image alone, however long the answer is (PVM, persistent visual memory). The model \
itself stays frozen and unforked; the memory is a small adapter.

\b
[bold]Five minutes, no GPU, no download[/bold]
[dim]# train a memory, measure it against its controls, read the report[/dim]
[cyan]keepsight demo --quick[/cyan]

\b
[bold]With your own images[/bold]
[dim]# what memory a model would get, and how large it is[/dim]
[cyan]keepsight info Qwen/Qwen3-VL-4B-Instruct[/cyan]
[dim]# teach it on a file of images and conversations; the model stays frozen[/dim]
[cyan]keepsight train pvm Qwen/Qwen3-VL-4B-Instruct -d train.jsonl -o my-memory[/cyan]
[dim]# ask, with the memory and without[/dim]
[cyan]keepsight generate my-memory --image cat.png --prompt "What is it?"[/cyan]
[cyan]keepsight generate my-memory --image cat.png --prompt "What is it?" --no-memory[/cyan]
[dim]# no model at hand? a tiny one, which reads handwritten digits, is built in[/dim]
[cyan]keepsight generate --image keepsight/digits.png --prompt read[/cyan]

Every command explains itself: [cyan]keepsight train pvm --help[/cyan]
"""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are called, inside a border that turns errors into messages."""

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        # Stand-ins that know their one line of help: enough for listing, and for "did you mean".
        self.commands = {
            name: TyperCommand(name, help=line, rich_help_panel=panel) for name, (_, _, line, panel) in COMMANDS.items()
        }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real command, for calling."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name in COMMANDS else command, rest

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **more: Any) -> Any:
        """Run a command. Errors print one message; `--debug` anywhere shows their traceback."""
        from keepsight.cli.common.console import ClickError, error_border, fail

        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        words = [word for word in words if word != "--debug"]
        with error_border(debug, extra="lab" if words[:1] in (["demo"], ["lab"]) else "train"):
            if debug:
                os.environ["KEEPSIGHT_DEBUG"] = "1"
            try:
                with _never_silent(words) as speaking:
                    status = super().main(words, "keepsight", obj=speaking, **{**more, "standalone_mode": False})
            except ClickError as error:
                context = getattr(error, "ctx", None)
                path = context.command_path if context is not None else "keepsight"
                if error.format_message():  # empty where the help has been printed instead
                    fail(f"{_asked(error)} How to use it: {path} --help")
                raise SystemExit(error.exit_code) from error
            finally:
                os.environ.pop("KEEPSIGHT_DEBUG", None)
            if status == 130:
                raise KeyboardInterrupt
        raise SystemExit(status if isinstance(status, int) else 0)


def _never_silent(words: list[str]) -> AbstractContextManager[Any]:
    """Lines in a log file from a command that computes between the stages that it tells of, or before them.

    It is the `obj` of the command's context, so that a server can end it when it begins to wait for others.
    """
    from keepsight.cli.common.console import first_of_all
    from keepsight.cli.common.progress import EVERY, Progress

    if not words or not first_of_all():
        return nullcontext()
    return Progress(f"keepsight {words[0]}", every=1.25 * EVERY)  # so that a stage, which knows more, speaks first


def _asked(error: Any) -> str:
    """What is wrong with the command line, as a sentence, and what was meant."""
    near = getattr(error, "possibilities", None)
    if near and "Did you mean" not in error.message:
        return f"{error.message.rstrip('.')}. Did you mean {' or '.join(near)}?"
    sentence = error.format_message().rstrip(".").replace("Value error, ", "")
    return sentence if sentence.endswith("?") else f"{sentence}."


def _load(name: str) -> Any:
    from keepsight.cli.common.options import Command

    module, attribute, line, _ = COMMANDS[name]
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name, group.help = name, group.help or line
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    single.command(name, cls=Command)(found)
    return typer.main.get_command(single)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import keepsight

        print(f"keepsight {keepsight.__version__}")
        raise typer.Exit


@app.callback(help=HELP, invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and all warnings of libraries.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of `keepsight`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    app()
