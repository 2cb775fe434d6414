"""An adapter of the product on the eye: latents are its image's or another's, and none is none."""

import dataclasses

import pytest
import torch
from peft import get_peft_model

import keepsight
from keepsight.vismem import VisMemConfig, add_memory_tokens
from studies.eye import sequences
from studies.eye.comparing import latents
from studies.eye.language import with_eye
from studies.eye.publishing.export import export
from tests.studies.eye.tiny_eye import SIZE, drawings, language, tokenizer

EXACT = dataclasses.replace(SIZE, dtype="float32")
TOLD = [sequences.narration("It was a long way to the sea. " * 9, tokenizer()).ids for _ in range(2)]


@pytest.fixture(scope="module")
def equipped(tmp_path_factory):
    """An exported eye with a strong random VisMem."""
    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(1)
    export(with_eye(language(), tokenizer(), EXACT), tokenizer(), EXACT, 2, folder)
    model, processor = keepsight.load(folder, device="cpu")
    config = VisMemConfig(num_short=2, num_long=3)
    add_memory_tokens(processor, config)
    model = get_peft_model(model, config).eval()
    for name, value in model.named_parameters():
        if "lora" in name or "short_" in name or "long_" in name or "query" in name:
            value.data.copy_(torch.randn_like(value))
    return model, processor


@pytest.mark.filterwarnings("ignore::keepsight.errors.KeepsightWarning")
def test_each_memory_is_what_it_is_called(equipped):
    model, processor = equipped
    these = latents.tested(drawings(), EXACT, 2, 4)
    rows = latents.measure(model, processor, these, TOLD, [0, 64], free=True)
    said = {(row["memory"], row["length"]): row["said"] for row in rows}
    for length in (0, 64):
        for number, one in enumerate(these):
            inputs = latents._inputs(processor, one, TOLD[number % 2][:length])
            plain = model.generate(**inputs, memory="off", max_new_tokens=latents._room(model), do_sample=False)
            assert said["never", length][number] == latents._texts(processor, inputs, plain)[0]
            other = latents._other(these, number)
            if other is None:
                assert said["long, other", length][number] is None
                continue
            of_other = latents._inputs(processor, these[other], TOLD[other % 2][:length])
            for kind in ("short", "long"):
                given = latents._answers(model, processor, of_other, None)[1]
                found, own = latents._answers(model, processor, inputs, given)
                assert not torch.allclose(own[kind], given[kind])
                assert found[f"{kind}, other"] == said[f"{kind}, other", length][number]
                again, _ = latents._answers(model, processor, inputs, own)
                assert again[f"{kind}, other"] == again[kind] == said[kind, length][number]
    assert {len(row[bits]) for row in rows for bits in ("right", "named", "follows")} == {4}
    assert any("| free | " in line for line in latents.table(rows))


def test_a_thing_may_be_named_in_other_words_than_the_answers():
    row = {"memory": "short", "length": 0, "right": "10-0", "named": "11-0"}
    assert latents.table([row])[-1] == "| short | 33 % of 3 (named: 67 %) |"
    assert latents.table([row | {"named": "10-0"}])[-1] == "| short | 33 % of 3 |"
    assert latents._names("it is an Airplane.", ["sea", "airplane"])
    assert not latents._names("A season.", ["sea"])
