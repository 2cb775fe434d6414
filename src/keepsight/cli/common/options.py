"""Command-line options made of dataclasses: a setting's default, help and name stand in the dataclass alone.

A command takes dataclasses as parameters; on the command line every field that was declared with `setting` is an option
of its own, and `--config` and `--save-config` read and write them all.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from keepsight.cli.common.console import UsageError, first_of_all, listen_to_warnings
from keepsight.errors import KeepsightError
from keepsight.train.run.fields import PANELS, RUN, Setting, setting_of

#: Former name of an option -> today's. They are taken, and not shown.
FORMER = {
    "--completions": "--group-size",
    "--max-words": "--max-new-tokens",
    "--out": "--output-dir",
    "--rollout-batch": "--rows-per-rollout",
}
#: What others call an option -> our name, to answer those who try it.
ELSEWHERE = {
    "--batch": "--batch-size",
    "--beta": "--kl",
    "--clip-range": "--clip",
    "--cutoff-len": "--max-length",
    "--dataloader-num-workers": "--workers",
    "--epsilon": "--clip",
    "--eval-data": "--eval-dataset",
    "--grad-clip": "--max-grad-norm",
    "--gradient-accumulation-steps": "--grad-accum",
    "--kl-coef": "--kl",
    "--learning-rate": "--lr",
    "--lora-r": "--lora-rank",
    "--lr-scheduler-type": "--scheduler",
    "--max-completion-length": "--max-new-tokens",
    "--max-new-tokens": "--max-output-tokens",
    "--max-prompt-length": "--max-length",
    "--max-seq-length": "--max-length",
    "--max-tokens": "--max-new-tokens",
    "--num-generations": "--group-size",
    "--num-iterations": "--iterations",
    "--num-train-epochs": "--epochs",
    "--output": "--output-dir",
    "--per-device-train-batch-size": "--batch-size",
    "--quantization-bit": "--load-in-4bit",
    "--resume-from-checkpoint": "--resume",
    "--save-total-limit": "--keep-checkpoints",
    "--steps": "--max-steps",
    "--torch-dtype": "--dtype",
    "--train-file": "--data",
    "--warmup": "--warmup-ratio",
}
_HERE = ("config", "save_config")  # about this call, as is what follows: not saved
_NOT_SAVED = (*_HERE, "resume", "overwrite", "dry_run")


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: give a command an option for every field of the dataclasses among its parameters."""
    plain: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    made: list[tuple[str, inspect.Parameter]] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if is_dataclass(kind):
            groups[parameter.name] = kind
            made += [(found.panel, _option(kind, item, found)) for item, found in _settings(kind)]
        else:
            plain.append(parameter)
    made += [(RUN, parameter) for parameter in _FILES]
    made.sort(key=lambda one: PANELS.index(one[0]))
    every = [*plain, *(parameter for _, parameter in made)]

    @functools.wraps(command)
    def call(**given: Any) -> None:
        listen_to_warnings()
        values = {parameter.name: given[parameter.name] for parameter in plain}
        values |= {name: _filled(kind, given) for name, kind in groups.items()}
        if given["save_config"] is not None and first_of_all():
            _save(given["save_config"], given)
        command(**values)

    call.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return call


def _settings(kind: Any) -> Iterable[tuple[Field, Setting]]:
    return ((item, found) for item in fields(kind) if (found := setting_of(item)) is not None)


def _option(kind: Any, item: Field, found: Setting) -> inspect.Parameter:
    """The parameter from which typer makes a field's option."""
    annotation, default = get_type_hints(kind)[item.name], item.default
    assert default is not MISSING
    several = default is not None and isinstance(default, tuple)
    if several:
        annotation, default = list[str], list(default)
    option = typer.Option(
        *found.names, help=found.help, rich_help_panel=found.panel, show_default=not several and default is not False
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option]
    )


def _filled(kind: Any, given: dict[str, Any]) -> Any:
    values = {}
    for item, found in _settings(kind):
        value = given[item.name]
        if isinstance(item.default, tuple):
            value = tuple(value or ())
        elif found.zero_is_none and value == 0:
            value = None
        values[item.name] = value
    return kind(**values)


def is_default(options: Any, name: str) -> bool:
    """Whether a field of a dataclass holds its default."""
    return getattr(options, name) == next(item.default for item in fields(options) if item.name == name)


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Take the settings in a file as defaults of the options that are not given."""
    if path is None or context.resilient_parsing:
        return path
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise KeepsightError(f"--config {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict):
        raise KeepsightError(f"--config {path}: expected settings, one a line, such as `lr: 0.0001`.")
    options = {parameter.name: parameter for parameter in context.command.params}
    spelled = {word: parameter.name for parameter in context.command.params for word in parameter.opts}
    values = {}
    for key, value in read.items():
        word = f"--{str(key).replace('_', '-')}"
        name = str(key) if str(key) in options else spelled.get(FORMER.get(word, word), word[2:].replace("-", "_"))
        if name not in options or name in _HERE:
            elsewhere = ELSEWHERE.get(f"--{name.replace('_', '-')}", "")[2:].replace("-", "_")
            near = [elsewhere] if elsewhere in options else difflib.get_close_matches(name, options, 1)
            raise KeepsightError(
                f"--config {path}: {context.command_path} has no setting {str(key)!r}."
                + (f" Did you mean {near[0]!r}?" if near else f" They are listed in {context.command_path} --help.")
            )
        several = options[name].multiple if hasattr(options[name], "multiple") else False
        if value is None and options[name].default is not None:
            raise KeepsightError(f"--config {path}: {key} has no value. Leave the line out for the default.")
        if several:
            listed = value if isinstance(value, list) else [value]
            value = [word for one in listed for word in _words(path, key, one, one is value)]
        elif isinstance(value, list) and not several:
            value = ",".join(str(part) for part in value)  # layers: [8, 16]
        values[name] = value
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _words(path: Path, key: Any, value: Any, alone: bool) -> list[str]:
    """An entry of a setting of several as the words of the command line: `columns: {question: query}`."""
    plain = isinstance(value, dict) and not any(isinstance(one, (dict, list)) or one is None for one in value.values())
    if plain and (alone or len(value) == 1):  # a list of mappings with several keys is another tool's form
        return [f"{ours}={theirs}" for ours, theirs in value.items()]
    if isinstance(value, (dict, list)) or value is None:
        raise KeepsightError(
            f"--config {path}: {key} holds {str(value)[:60]!r}; expected words, or NAME: VALUE for what is written "
            "NAME=VALUE on the command line."
        )
    return [str(value)]


def recipe_of(recipes: dict[str, dict[str, Any]]) -> Callable[[typer.Context, str], str]:
    """Callback of an eager option that names a recipe: its settings become defaults, which --config overrides.

    Args:
        recipes: name -> option's parameter -> default.
    """

    def choose(context: typer.Context, name: str) -> str:
        context.default_map = {**recipes[name], **(context.default_map or {})}
        return name

    return choose


def _save(path: Path, given: dict[str, Any]) -> None:
    import yaml

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, (list, tuple)) else str(value) if isinstance(value, Path) else value

    kept = {name: plain(value) for name, value in given.items() if name not in _NOT_SAVED and value is not None}
    text = f"# to be read with --config {path}\n" + yaml.safe_dump(kept, sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise KeepsightError(f"--save-config {path} is there already and holds something else. Choose another name.")
    path.write_text(text, encoding="utf-8")


_FILES = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, option])
    for name, option in (
        (
            "config",
            typer.Option(
                help="Read settings from a YAML file; what is given here counts more.",
                rich_help_panel=RUN,
                is_eager=True,
                callback=_read,
                exists=True,
                dir_okay=False,
            ),
        ),
        ("save_config", typer.Option(help="Write all settings to a YAML file for --config.", rich_help_panel=RUN)),
    )
]


class Command(TyperCommand):
    """A command that takes former names of its options and knows what others call them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with former names replaced; a name that others use is answered with ours."""
        former = self._ours(FORMER)
        words = []
        for word in args:
            name, equals, value = word.partition("=")
            words.append(former.get(name, name) + equals + value)
        try:
            return super().parse_args(ctx, words)
        except UsageError as error:
            called = {other: ELSEWHERE.get(ours, ours) for other, ours in {**ELSEWHERE, **FORMER}.items()}
            elsewhere = {**self._ours(called), **self._ours(ELSEWHERE), **former}
            options, given = self._options(), getattr(error, "option_name", "")
            near = difflib.get_close_matches(given, [*elsewhere, *options], 1, 0.8)
            near = near or sorted(name for name in options if given and name.startswith(given))[:1]
            if hasattr(error, "possibilities"):  # Click's own are often far from it
                error.possibilities = [elsewhere.get(name, name) for name in near]
            raise

    def _options(self) -> set[str]:
        return {name for parameter in self.params for name in parameter.opts if name.startswith("--")}

    def _ours(self, names: dict[str, str]) -> dict[str, str]:
        """Those of the names that mean an option of this command, and are none."""
        options = self._options()
        return {other: ours for other, ours in names.items() if ours in options and other not in options}
