"""Engines are read from what `accelerate launch` announces; combinations that would hang are refused with a lesson."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.train.run.engines import Engine, check_engine, current_engine

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"


def announced(file: str) -> dict[str, str]:
    """The environment that `accelerate launch` gives every process for a shipped config file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / file), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ddp.yaml", "ddp"),
        ("fsdp2.yaml", "fsdp2"),
        ("deepspeed_zero2.yaml", "zero2"),
        ("deepspeed_zero3.yaml", "zero3"),
    ],
)
def test_shipped_config_files_announce_their_engine(file: str, name: str) -> None:
    environment = announced(file) | {"WORLD_SIZE": "8", "RANK": "3"}  # the last two come from torchrun
    assert current_engine(environment) == Engine(name, processes=8, rank=3)


def test_without_a_launcher_there_is_one_process() -> None:
    assert current_engine({}) == Engine("single", 1, 0)
    assert current_engine({}).is_main
    assert current_engine({"WORLD_SIZE": "2", "RANK": "1"}) == Engine("ddp", 2, 1)


def test_the_stage_of_a_deepspeed_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    found = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert current_engine(found).name == "zero3"


@pytest.mark.parametrize(
    ("name", "spoken", "why"),
    [("fsdp2", "FSDP2", "wait for the others"), ("zero3", "DeepSpeed ZeRO-3", "wait"), ("zero2", "ZeRO-2", "is small")],
)
def test_vismem_is_trained_data_parallel_only(name: str, spoken: str, why: str, deepspeed: None) -> None:
    with pytest.raises(KeepsightError, match=rf"cannot be trained with .*{spoken}: .*{why}.*ddp.yaml"):
        check_engine(Engine(name, 2), "vismem", on_gpu=True)
    check_engine(Engine("ddp", 2), "vismem", on_gpu=True)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if DeepSpeed were installed."""
    from keepsight.train.run import engines

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    ("engine", "options", "lesson"),
    [
        ("fsdp1", {}, "fsdp_version: 2"),
        ("zero3", {"text_only": 3}, "3 samples have no image.*--text-only skip"),
        ("zero3", {"checkpointing": True, "reentrant_works": False}, "detach_visual=True"),
    ],
)
def test_what_would_hang_or_fail_is_refused(engine: str, options: dict, lesson: str, deepspeed: None) -> None:
    with pytest.raises(KeepsightError, match=lesson):
        check_engine(Engine(engine, 2), "pvm", on_gpu=True, **options)


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero2", "zero3"])
def test_the_paper_recipe_is_refused_nowhere(name: str, deepspeed: None) -> None:
    check_engine(Engine(name, 8), "pvm", on_gpu=True, checkpointing=True)


def test_deepspeed_must_be_installed() -> None:
    from importlib.util import find_spec

    if find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is installed")
    with pytest.raises(KeepsightError, match="pip install deepspeed"):
        check_engine(Engine("zero2", 2), "pvm", on_gpu=True)


def test_sharding_on_cpus_warns_that_it_does_nothing() -> None:
    with pytest.warns(KeepsightWarning, match="no effect"):
        check_engine(Engine("fsdp2", 2), "pvm", on_gpu=False)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_on_cpus_is_refused(name: str, deepspeed: None) -> None:
    with pytest.raises(KeepsightError, match=r"on GPUs only.*ddp\.yaml"):
        check_engine(Engine(name, 2), "pvm", on_gpu=False)
