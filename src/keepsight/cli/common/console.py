"""Console output of the commands: results, messages, errors as one line, and quiet libraries.

Results go to stdout, everything else to stderr, so that `keepsight generate ... > answer.txt` holds the answer alone.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from keepsight.installed import MissingExtraError, install_line

#: Click's errors of usage, and of all that it refuses. Typer has Click from its own package or from Click's, by its
#: release; what it makes public of them in both is a subclass.
UsageError: Any = typer.BadParameter.__base__
ClickError: Any = UsageError.__base__
INTERRUPTED = 130  # what shells give a process that Ctrl-C ended

out = Console(soft_wrap=False)
err = Console(stderr=True)
last_line_at = 0.0  # when something was last said, on the monotonic clock

_EXTRA_OF = {
    "sklearn": "lab",
    "matplotlib": "lab",
    "trl": "train",
    "datasets": "train",
    "accelerate": "train",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}
_FULL_DISK = (
    "No space left",
    "PytorchStreamWriter",
    "inline_container",  # torch.save, where a write came to less than it should
    "file write failed",
    "Disk quota",
    "File too large",
)
_IMAGE_LIBRARIES = ("PIL", "torchvision")  # both extras bring them


class Interrupted(Exception):
    """Ctrl-C, with something to tell the user."""


def say(line: str, label: str = "", style: str = "") -> None:
    """One line on stderr, never wrapped, never read as markup."""
    global last_line_at
    last_line_at = time.monotonic()
    console = Console(stderr=True)
    if label:
        console.print(f"{label}: ", style=style, end="", highlight=False)
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def facts_table(title: str, rows: Iterable[tuple[str, str]] = ()) -> Table:
    """A table of names and their values."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def warn(message: str) -> None:
    """A warning, in one line."""
    say(message, "warning", "yellow bold")


def fail(message: str) -> None:
    """An error, in one message."""
    say(message, "error", "red bold")


@contextmanager
def error_border(debug: bool, extra: str = "train") -> Iterator[None]:
    """Turn what commands raise into one clear message and an exit status.

    Args:
        debug: show the traceback as well.
        extra: which extra to name where an image library is missing.

    Raises:
        SystemExit: 1 for errors, 130 for Ctrl-C.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        say(str(stop) or "stopped by Ctrl-C", "interrupted", "yellow bold")
        raise SystemExit(INTERRUPTED) from stop
    except BrokenPipeError as error:  # `keepsight ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error
    except Exception as error:
        if debug:
            traceback.print_exc()
        fail(explain(error, extra))
        raise SystemExit(1) from error


def explain(error: Exception, extra: str = "train") -> str:
    """What to tell the user about an exception; `extra` is the one to name where an image library is missing."""
    text = str(error).strip()
    if isinstance(error, ImportError) and not isinstance(error, MissingExtraError):
        missing = (getattr(error, "name", None) or "").partition(".")[0]
        for name in (*_EXTRA_OF, *_IMAGE_LIBRARIES):
            if missing == name or f"requires the {name.lower()}" in text.lower():
                which = _EXTRA_OF.get(name, extra)
                return f"this command needs {name}, which is not installed. Install it: {install_line(which)}"
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text.lower():
        return (
            "out of memory. Try fewer samples at once (--batch-size 1), --gradient-checkpointing, smaller images, a "
            "shorter --max-length, or --dtype bfloat16."
        )
    if any(sign in text for sign in _FULL_DISK):
        return (
            "the disk is full, or cannot be written. Checkpoints saved before are whole: free some space and give the "
            "same command with --resume."
        )
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file or folder."
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}. What was saved before is intact."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text or type(error).__name__
    return (
        f"{type(error).__name__}: {text or 'no message'}\nThis should not happen. Run the command again with --debug "
        "and report what it prints."
    )


def listen_to_warnings() -> None:
    """Show our own warnings, a line each, and no library's. `--debug` leaves them all as they are."""
    if debugging():
        return
    from keepsight.errors import KeepsightWarning

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", KeepsightWarning)
    warnings.showwarning = lambda message, category, *rest, **more: warn(str(message))


def quiet() -> None:
    """Silence what libraries say while loading, so that our own warnings are seen. `--debug` leaves them on."""
    if debugging():
        return
    listen_to_warnings()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if sys.modules.get("datasets") is not None:
        sys.modules["datasets"].disable_progress_bars()


def with_examples(*examples: tuple[str, str]) -> Any:
    """Decorator that ends a command's help with examples, each a comment and the command it explains."""

    def add(command: Any) -> Any:
        lines = [line for comment, call in examples for line in (f"[dim]# {comment}[/dim]", f"[cyan]{call}[/cyan]")]
        paragraphs = [" ".join(text.split()) for text in inspect.cleandoc(command.__doc__).split("\n\n")]
        command.__doc__ = "\n\n".join([*paragraphs, "\b\n[bold]Examples[/bold]\n" + "\n".join(lines)])
        return command

    return add


def first_of_all() -> bool:
    """Whether this is the process, of several that train together, that talks."""
    return os.environ.get("RANK", "0") == "0"


def debugging() -> bool:
    """Whether `--debug` was given."""
    return "KEEPSIGHT_DEBUG" in os.environ


def check_device(device: str | None) -> None:
    """Refuse a --device that nothing can be computed on, before anything is loaded."""
    import torch

    from keepsight.errors import KeepsightError

    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise KeepsightError(f"--device {device}: not a device; write cpu, cuda, cuda:1 or mps.") from error
    if kind not in ("cpu", "cuda", "mps", "xpu", "npu", "hpu"):
        raise KeepsightError(f"--device {device}: nothing can be computed there; write cpu, cuda, cuda:1 or mps.")
    there: dict[str, Any] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if kind in there and not there[kind]():
        raise KeepsightError(f"--device {device}: torch finds none on this machine. Leave --device out to use the CPU.")


def refuse_twins(infos: list[Any], way_out: str) -> None:
    """Refuse two adapters of one method on a model: the second would be loaded and do nothing.

    Args:
        infos: what `check_sources` found.
        way_out: what to do instead, a sentence.
    """
    from keepsight.errors import KeepsightError

    taken: dict[str, Any] = {}
    for info in infos:
        if info.method in taken:
            first = taken[info.method].path
            if first == info.path:
                raise KeepsightError(f"{info.path} is given twice. It is one {info.method}, and active once.")
            raise KeepsightError(
                f"{first} and {info.path} are both {info.method}s, and only one can be active. {way_out}"
            )
        taken[info.method] = info
