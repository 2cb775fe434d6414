"""Recipes cannot rot: their flags are the command line's, and their table is what dry runs say."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from keepsight.cli import app
from keepsight.cli.common.console import UsageError
from keepsight.train.pvm.blindfold import BlindfoldSchedule
from keepsight.train.run.engines import current_engine

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
estimate = importlib.import_module("estimate")
shapes = importlib.import_module("shared.shapes")

RECIPES = estimate.recipes()
# One per command and one per engine are run dry; every recipe's flags are parsed.
RUN_DRY = (
    "qwen3-vl-8b-sft-as-published",
    "qwen3-vl-4b-grpo-24gb",
    "qwen2.5-vl-7b-formation-24gb",
    "qwen2.5-vl-7b-invocation",
)


def parse(recipe: Any) -> dict[str, Any]:
    """What the real command line makes of a recipe's flags; raises where it knows one of them not."""
    return context_of(recipe).params


def context_of(recipe: Any) -> Any:
    command, words, name = typer.main.get_command(app), list(recipe.command), "keepsight"
    context: Any = None
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(words), parent=context, resilient_parsing=True)
        name, command, words = command.resolve_command(context, words)
    return command.make_context(name, words, parent=context)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.path.stem)
def test_every_flag_is_one_of_the_command_lines(recipe: Any) -> None:
    given = parse(recipe)
    assert given["dataset"] == ["$DATA"]
    assert str(given["output_dir"]) == "$OUT"
    assert recipe.path.stat().st_mode & 0o100, "a script is executable"
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(recipe.path)], check=True)
    if recipe.config is not None:
        assert recipe.config.is_file()
        assert current_engine(recipe.environment()).processes == 8


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.path.stem)
def test_every_recipe_gets_as_far_as_its_run(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through all that a command checks of its settings; what is behind needs data, and weights."""
    reached = []
    module = importlib.import_module(f"keepsight.cli.train.{recipe.command[1].replace('-', '_')}")
    monkeypatch.setattr(module, "run_and_report", lambda train, source, job, *_: reached.append((train, source, job)))
    context = context_of(recipe)
    with context:
        context.command.invoke(context)
    ((train, source, job),) = reached
    assert source in (recipe.base, "$MEMORY", "$STAGE1")
    data, out = job.checked()
    assert ([reading.source for reading in data.readings], out) == (["$DATA"], Path("$OUT"))
    settings = train.keywords["settings"]
    if recipe.kind == "sft":
        published = recipe.path.stem.endswith("as-published")
        assert train.keywords["pvm"].causal is not published
        assert bool(BlindfoldSchedule.of(settings, 1000)) is not published
        assert settings.attention == ("flash_attention_2" if published else None)


def test_docs_and_recipes_agree_on_what_runs_under_deepspeed() -> None:
    under = {recipe.path.stem for recipe in RECIPES if recipe.config is not None and "deepspeed" in recipe.config.stem}
    told = (ROOT / "recipes" / "README.md").read_text().partition("have not tested")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(qwen[^`]+)`", told)) == under
    for recipe in RECIPES:
        text = recipe.path.read_text()
        assert "NOT TESTED" in text
        assert (recipe.path.stem in under) == ("no step under DeepSpeed" in text), recipe.path.name


@pytest.mark.parametrize("recipe", RECIPES[:1], ids=lambda recipe: recipe.path.stem)
def test_a_flag_that_is_no_more_is_found(recipe: Any) -> None:
    rotten = dataclasses.replace(recipe, command=[*recipe.command, "--rotten", "1"])
    with pytest.raises(UsageError, match="--rotten"):
        parse(rotten)


def test_a_recipe_makes_defaults_and_what_is_given_counts_more(tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.path.stem == "qwen3-vl-4b-sft-24gb")
    config = tmp_path / "run.yaml"
    config.write_text("recipe: paper\ngate_lr_multiplier: 3.0\n")

    def parsed(*more: str) -> tuple[Any, ...]:
        words = ["train", "pvm", "BASE", "--data", "$DATA", "--output-dir", "$OUT", *more]
        given = parse(dataclasses.replace(recipe, command=words))
        return tuple(given[name] for name in ("blindfold_steps", "gate_lr_multiplier", "causal"))

    assert parsed() == (None, 10.0, True)
    assert parsed("--recipe", "paper") == (0, 1.0, False)
    assert parsed("--recipe", "paper", "--causal", "--blindfold-steps", "5") == (5, 1.0, True)
    assert parsed("--config", str(config)) == (0, 3.0, False)
    assert parsed("--recipe", "paper", "--config", str(config)) == (0, 3.0, False)
    assert parsed("--config", str(config), "--recipe", "keepsight") == (None, 3.0, True)


def test_the_paper_recipes_are_the_papers() -> None:
    given = {recipe.path.stem: parse(recipe) for recipe in RECIPES}
    for size in ("4b", "8b"):
        published = "qwen3-vl-8b-sft-as-published"
        sft, grpo = given[published if size == "8b" else "qwen3-vl-4b-sft"], given[f"qwen3-vl-{size}-grpo"]
        assert 8 * sft["batch_size"] * sft["grad_accum"] == 64
        assert (sft["lr"], sft["scheduler"], sft["warmup_ratio"], sft["epochs"], sft["width"]) == (
            1e-4,
            "cosine",
            0.1,
            1,
            512,
        )
        assert sft["causal"] is (size == "4b")
        assert 8 * grpo["batch_size"] * grpo["grad_accum"] == 64
        assert (grpo["lr"], grpo["scheduler"], grpo["kl"], grpo["group_size"], grpo["max_new_tokens"]) == (
            1e-6,
            "constant",
            0,
            8,
            16384,
        )
        assert grpo["policy"] == "full"
    for stage in ("formation", "invocation"):
        vismem = given[f"qwen2.5-vl-7b-{stage}"]
        assert (vismem["batch_size"], vismem["group_size"], vismem["epochs"], vismem["lr"]) == (8, 16, 2, 5e-5)
        assert (vismem["clip"], vismem["kl"], vismem["target_kl"], vismem["warmup_ratio"]) == (0.2, 0.015, 0.03, 0.2)
    formation = given["qwen2.5-vl-7b-formation"]
    assert (formation["num_queries"], formation["num_short"], formation["num_long"]) == (8, 8, 16)


def test_the_table_lists_every_recipe_once() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    listed = text.partition(estimate.BEGIN)[2].partition(estimate.END)[0]
    for recipe in RECIPES:
        assert listed.count(f"]({recipe.path.relative_to(ROOT / 'recipes')})") == 1, recipe.path.name
    assert listed.count(".sh)") == len(RECIPES)


@pytest.mark.parametrize("name", RUN_DRY)
def test_the_table_is_what_dry_runs_say(name: str, tmp_path: Path) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.path.stem == name)
    output = recipe.dry_run(estimate.make_base(recipe.base, tmp_path))
    row = estimate.line(recipe, estimate.rows_of(output)).split(" | ")
    lines = (ROOT / "recipes" / "README.md").read_text().splitlines()
    written = next(line for line in lines if f"/{name}.sh)" in line and line.startswith("|")).split(" | ")
    memory = 3
    # What a trace keeps differs a little between versions of torch and transformers; the rest follows from the shapes.
    assert float(written[memory]) == pytest.approx(float(row[memory]), rel=0.02), "python recipes/estimate.py --write"
    del row[memory], written[memory]
    assert written == row, "python recipes/estimate.py --write"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as the hub counts the released weights
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ],
)
def test_shapes_are_those_of_the_released_models(name: str, parameters: int) -> None:
    assert shapes.count(name)[0] == parameters
