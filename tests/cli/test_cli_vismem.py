"""`keepsight info` and `keepsight generate` for VisMem adapters."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from command_line import keepsight_cli
from PIL import Image

import keepsight
from keepsight.vismem import VisMemBranch, add_memory_tokens

sys.path.insert(0, str(Path(__file__).parent.parent / "vismem"))
from vismem_helpers import attach


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of the shipped model that the model invokes at once: long-term, twice at most."""
    folder = tmp_path_factory.mktemp("latent")
    model, processor = keepsight.load("keepsight/reference")
    model = attach(model, max_invocations=2, policy="only_long", max_text_states=4)
    add_memory_tokens(processor, model)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(1e4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "red.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def test_info_describes_a_vismem_adapter(adapter: Path) -> None:
    text = keepsight_cli("info", adapter).stdout
    for words in ("VisMem, latent vision memory", "5 latents; rank 4", "the latest 4 text states", "<|long_memory|>"):
        assert words in text
    facts = json.loads(keepsight_cli("info", adapter, "--json").stdout)
    assert facts["trained"] == {"short": True, "long": True, "invocation": True}
    assert (facts["method"], facts["num_long"], facts["policy"]) == ("VISMEM", 5, "only_long")


def test_info_says_what_was_never_trained(tmp_path: Path) -> None:
    from peft import get_peft_model

    model, _ = keepsight.load("keepsight/reference")
    get_peft_model(model, keepsight.VisMemConfig()).save_pretrained(tmp_path)
    result = keepsight_cli("info", tmp_path)
    assert result.stdout.count("never trained: noise") == 2
    assert "invocation tokens never trained" in result.stdout


def test_generate_shows_memory(adapter: Path, image: Path) -> None:
    words = ["generate", adapter, "-i", image, "-p", "read", "--max-new-tokens", 30]
    plain, shown = keepsight_cli(*words), keepsight_cli(*words, "--show-memory")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == plain.stdout  # the answer hides memories
    assert "memory at token" not in plain.stdout + plain.stderr
    found = re.findall(r"\[long-term memory at token (\d+), .*: 5 latents, formed from (\d+) visual", shown.stderr)
    places = [int(at) for at, _ in found]
    assert places[0] == 0
    assert len(places) == 2
    assert places[1] >= 7 + 5  # the first memory's seven tokens, and as many words as it has latents
    assert "loop was cut" in plain.stderr
    assert all(int(visual) > 0 for _, visual in found)


def test_no_memory_is_the_base(adapter: Path, image: Path) -> None:
    words = ["-i", image, "-p", "read", "--max-new-tokens", 8]
    without = keepsight_cli("generate", adapter, *words, "--no-memory")
    base = keepsight_cli("generate", "keepsight/reference", *words)
    assert without.stdout == base.stdout
    assert "no effect" not in without.stderr
    warned = keepsight_cli("generate", "keepsight/reference", *words, "--show-memory")
    assert "--show-memory has no effect" in warned.stderr


@pytest.mark.parametrize("typed", ["<|image_pad|>", "<|long_memory|>", "<|/short_memory|>"])
def test_what_stands_for_images_and_memories_cannot_be_typed(adapter: Path, image: Path, typed: str) -> None:
    result = keepsight_cli("generate", adapter, "-i", image, "-p", f"read {typed}{typed}")
    assert result.exit_code == 1
    assert f"--prompt holds {typed}" in result.stderr
