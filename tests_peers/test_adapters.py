"""PEFT's shared adapter tests (their own file), for both memories, on tiny models of two families."""

from __future__ import annotations

import inspect
from typing import Any

import models
import pytest
import torch
import upstream

upstream.prepare()

from peft_tests.testing_common import PeftCommonTester  # noqa: E402

import keepsight  # noqa: E402

FAMILIES = ("qwen2_5_vl", "llava_onevision")
CONFIGS = {"pvm": keepsight.PvmConfig, "vismem": keepsight.VisMemConfig}
#: Of their checks, those that are about other methods' settings.
OTHERS = (
    "lora",
    "ia3",
    "prompt_learning",
    "weighted_combination",
    "adding_multiple_adapters_with_bias",
    "layer_indexing",
)
MORE: dict[str, dict[str, Any]] = {
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "_test_generate_pos_args": {"raises_err": False},
    "_test_passing_input_embeds_works": {"test_name": "ours"},
}
CHECKS = [
    name
    for name, check in inspect.getmembers(PeftCommonTester, inspect.isfunction)
    if name.startswith("_test_")
    and "model_id" in inspect.signature(check).parameters
    and not any(o in name for o in OTHERS)
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny bases, saved."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        models.build(name, "plain").save_pretrained(folder)
        found[name] = str(folder)
    return found


class Tester(PeftCommonTester):
    """Their tests, on a VLM of one family."""

    torch_device = "cpu"

    def __init__(self, family: str):
        self.family = family
        self.transformers_class = models.model_class(family, "plain")

    def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
        return models.inputs_of(self.family)

    prepare_inputs_for_common = prepare_inputs_for_testing


@pytest.mark.parametrize("memory", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_adapter(check: str, family: str, memory: str, folders: dict[str, str]) -> None:
    """One of PEFT's checks."""
    config = models.memory_config(memory)
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    drop = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
    settings = {name: value for name, value in given.items() if name not in drop and not name.startswith("base_")}
    if memory == "vismem":
        settings["policy"] = "off"  # what is written is compared with what forward gives
    more = MORE.get(check, {})
    getattr(Tester(family), check)(model_id=folders[family], config_cls=CONFIGS[memory], config_kwargs=settings, **more)
