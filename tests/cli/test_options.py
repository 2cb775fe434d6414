"""Options made of dataclasses: what the command line asks is what the settings say, from words and from files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
import yaml
from command_line import keepsight_cli, message
from typer.main import get_command
from typer.testing import CliRunner, Result

from keepsight.cli.common.console import error_border
from keepsight.cli.common.options import Command, settings_options
from keepsight.cli.train import train_app
from keepsight.cli.train.options import PvmOptions, VisMemOptions
from keepsight.pvm import PvmConfig
from keepsight.train.run.fields import RUN, STEPS, setting, setting_of
from keepsight.train.run.settings import GrpoSettings, SftSettings
from keepsight.train.vismem.settings import FormationSettings, InvocationSettings
from keepsight.vismem import VisMemConfig

COMMANDS = {
    "pvm": SftSettings,
    "pvm-grpo": GrpoSettings,
    "vismem-formation": FormationSettings,
    "vismem-invocation": InvocationSettings,
}


@dataclass(frozen=True, kw_only=True)
class Baking:
    lr: float = setting(0.5, "Heat.", STEPS)
    group_size: int = setting(3, "Loaves.", STEPS)
    limit: float | None = setting(0.25, "Of salt.", STEPS, zero_is_none=True)
    seeds: tuple[str, ...] = setting((), "On top.", STEPS, "--seed")
    layers: str | None = setting(None, "Which.", STEPS)
    causal: bool = setting(True, "Or not.", STEPS, "--causal/--published-rule")
    resume: bool = setting(False, "Again.", RUN, "--resume")
    mode: Literal["slow", "fast"] = setting("slow", "How.", RUN)
    where: Path | None = setting(None, "To.", RUN)
    unasked: int = 7


made: list[tuple[str, Baking]] = []
app = typer.Typer()
app.callback()(lambda: None)


def bake(source: str, baking: Baking) -> None:
    """Bake."""
    made.append((source, baking))


app.command("bake", cls=Command)(settings_options(bake))


def run(*words: Any) -> Result:
    with error_border(debug=False):
        return CliRunner().invoke(app, ["bake", *map(str, words)], catch_exceptions=False)


def baked(*words: Any) -> Baking:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return made.pop()[1]


def test_defaults_are_the_dataclass() -> None:
    assert baked("rye") == Baking()


def test_words_fill_the_dataclass() -> None:
    words = "--lr 2 --group-size 4 --seed a --seed b --layers 1,2 --published-rule --resume --mode fast --where x"
    assert baked("rye", *words.split()) == Baking(
        lr=2,
        group_size=4,
        seeds=("a", "b"),
        layers="1,2",
        causal=False,
        resume=True,
        mode="fast",
        where=Path("x"),
    )
    assert baked("rye", "--limit", 0).limit is None


@pytest.mark.parametrize("words", [["--completions", "5"], ["--completions=5"]])
def test_former_names_are_taken_and_not_shown(words: list[str]) -> None:
    assert baked("rye", *words).group_size == 5
    assert "--completions" not in run("--help").output


def test_saved_settings_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "bake.yaml"
    words = ["--lr", 1e-4, "--limit", 0, "--seed", "a", "--published-rule", "--where", "x", "--layers", "1,2"]
    first = baked("rye", *words, "--save-config", file, "--resume")
    again = baked("--config", file)
    assert again == dataclasses.replace(first, resume=False)  # of a call, not of a run
    assert baked("--config", file, "--lr", 3, "--seed", "b", "--causal") == dataclasses.replace(
        again, lr=3, seeds=("b",), causal=True
    )
    assert set(yaml.safe_load(file.read_text())) >= {"source", "lr", "group_size", "mode"}
    baked("rye", *words, "--save-config", file)  # the same again
    with pytest.raises(SystemExit):
        run("rye", "--save-config", file)
    assert baked("--config", file) == again


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source: rye\nlr: 1e-4\nseeds: a\nlayers: [1, 2]\n", Baking(lr=1e-4, seeds=("a",), layers="1,2")),
        ("source: rye\ncompletions: 9\ngroup-size: 9\nlimit: 0\n", Baking(group_size=9, limit=None)),
        ("source: rye\ncausal: false\nwhere: null\n", Baking(causal=False)),
    ],
)
def test_files_as_people_write_them(text: str, expected: Baking, tmp_path: Path) -> None:
    (tmp_path / "bake.yaml").write_text(text)
    assert baked("--config", tmp_path / "bake.yaml") == expected


@pytest.mark.parametrize(
    ("text", "lesson"),
    [
        ("grop_size: 3", "has no setting 'grop_size'. Did you mean 'group_size'?"),
        ("num_generations: 3", "has no setting 'num_generations'. Did you mean 'group_size'?"),
        ("unasked: 3", "has no setting 'unasked'"),
        ("config: other.yaml", "has no setting 'config'"),
        ("- lr", "expected settings, one a line"),
        ("lr: [", "is no YAML"),
        ("limit:", "limit has no value"),
    ],
)
def test_files_that_are_refused(text: str, lesson: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bake.yaml").write_text(text)
    with pytest.raises(SystemExit):
        run("rye", "--config", tmp_path / "bake.yaml")
    assert lesson in capsys.readouterr().err


@pytest.mark.parametrize("text", ["lr: hot", "mode: medium", "group_size: 1.5"])
def test_values_of_a_file_are_checked_as_words_are(text: str, tmp_path: Path) -> None:
    (tmp_path / "bake.yaml").write_text(text)
    result = run("rye", "--config", tmp_path / "bake.yaml")
    assert result.exit_code == 2
    assert "Invalid value" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_of_a_stage_is_an_option_with_its_default(command: str) -> None:
    options = {option.name: option for option in get_command(train_app).commands[command].params}
    for item in dataclasses.fields(COMMANDS[command]):
        known = setting_of(item)
        if known is not None:
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            assert options[item.name].default == default, item.name
            assert options[item.name].help == known.help
    assert {"dataset", "output_dir", "resume", "dry_run", "config", "save_config"} <= set(options)


@pytest.mark.parametrize(("options", "config"), [(PvmOptions, PvmConfig), (VisMemOptions, VisMemConfig)])
def test_options_of_a_memory_have_its_configs_defaults(options: Any, config: Any) -> None:
    defaults = config()
    for item in dataclasses.fields(options):
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        assert default == getattr(defaults, item.name), item.name


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("genrate", "generate"),
        ("train pmv", "pvm"),
        ("generate --imgae x", "--image"),
        ("train pvm x --learning-rate 1", "--lr"),
        ("train pvm x --learning-rate=1", "--lr"),
        ("train pvm x --lerning-rate 1", "--lr"),
        ("generate -p x --max-tokens 4", "--max-new-tokens"),
        ("demo --outptu x", "--output-dir"),
        ("generate -p x --max-word 4", "--max-new-tokens"),
        ("serve --max-word 4", "--max-output-tokens"),
        ("serve --max-tokens 4", "--max-output-tokens"),
        ("train pvm x --grad 4", "--grad-accum"),
        ("train pvm x --gradient-accumulation-steps 1", "--grad-accum"),
        ("train pvm-grpo x --num-generations 4", "--group-size"),
        ("train vismem-formation x --beta 4", "--kl"),
    ],
)
def test_what_was_meant(line: str, meant: str) -> None:
    result = keepsight_cli(*line.split())
    assert result.exit_code == 2
    assert f"Did you mean {meant}" in result.stderr.replace("'", "")
    assert "? How to use it: keepsight" in result.stderr


@pytest.mark.parametrize("line", ["train pvm x --max-word 4", "generate -p x --epochs 4", "serve --temprature 1"])
def test_nothing_that_is_far_off_is_said_to_be_meant(line: str) -> None:
    result = keepsight_cli(*line.split())
    assert result.exit_code == 2
    assert "Did you mean" not in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("no_loading")
def test_a_file_reaches_the_settings_of_every_stage(command: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("source: keepsight/reference\nlr: -1\nmax_steps: 3\n")
    result = keepsight_cli("train", command, "--config", tmp_path / "run.yaml", "-d", "x", "-o", tmp_path / "out")
    assert "lr=-1.0: expected a number above 0" in message(result)
