"""Narrations: the prompt is the processor's, answers cannot be copied, lengths are what they say."""

import numpy as np
import pytest
import torch

from keepsight.lab.digits import CELLS
from keepsight.lab.evaluation import SCORED
from keepsight.lab.narration import (
    DIGITS,
    FILLER,
    TOKEN,
    VOCABULARY,
    gaps_for_length,
    make_narrations,
    prompt_messages,
)
from keepsight.lab.reference import build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def words(ids):
    return [VOCABULARY[i] for i in ids]


@pytest.mark.parametrize("prompt", ["describe", "read", "What is in this image?"])
def test_the_prompt_is_what_the_processor_makes_of_a_chat(processor, prompt):
    batch = make_narrations(processor, [2, 0], 2, "test", np.random.default_rng(0), prompt=prompt)
    text = processor.apply_chat_template(prompt_messages(prompt), tokenize=False, add_generation_prompt=True)
    for row, image in enumerate(batch.images):
        expected = processor(text=[text], images=[image], return_tensors="pt")
        assert expected["input_ids"][0].tolist() == batch.input_ids[row, : batch.start].tolist()
        patches = len(CELLS) * 4
        assert torch.equal(expected["pixel_values"], batch.inputs["pixel_values"][row * patches : (row + 1) * patches])
        marks = batch.inputs["mm_token_type_ids"][row, : batch.start]
        assert torch.equal(expected["mm_token_type_ids"][0], marks.to(expected["mm_token_type_ids"].dtype))


def test_no_answer_can_be_copied_from_the_text(processor):
    batch = make_narrations(processor, [3] * 12, 8, "train", np.random.default_rng(1))
    for row in range(8):
        said = words(batch.input_ids[row, batch.start :].tolist())
        cells = [word for word in said if word in CELLS]
        assert len(cells) == len(set(cells)) == 12
        for index, word in enumerate(said):
            if word in CELLS:  # the only place a digit can stand is behind its cell, and it is the image's digit
                assert said[index + 1] == str(batch.digits[row, CELLS.index(word)].item())
        assert sum(word in DIGITS for word in said) == 12


def test_answers_and_filler_are_where_they_say(processor):
    gaps = [0, 4, 1, 9]
    batch = make_narrations(processor, gaps, 3, "validation", np.random.default_rng(2))
    assert torch.equal(batch.input_ids[:, batch.answers], batch.truth())
    assert batch.lengths.tolist() == [1, 8, 12, 24]
    assert int(batch.filler.sum()) == sum(gaps)
    assert all(word in FILLER for word in words(batch.input_ids[0, batch.filler].tolist()))
    assert not any(word in FILLER for word in words(batch.input_ids[0, ~batch.filler].tolist()))


def test_truth_of_another_row(processor):
    batch = make_narrations(processor, [0] * 5, 4, "test", np.random.default_rng(3))
    rolled = batch.truth(roll=1)
    for row in range(4):
        other = batch.digits[row - 1]
        assert [TOKEN[str(other[cell].item())] for cell in batch.cells[row]] == rolled[row].tolist()


@pytest.mark.parametrize("length", [18, 19, 32, 64, 128, 255, 1024, 2048])
def test_scored_facts_stand_at_the_nominal_length(processor, length):
    gaps = gaps_for_length(length, scored=SCORED)
    batch = make_narrations(processor, gaps, 1, "test", np.random.default_rng(0))
    assert length - 2 <= batch.lengths[-1] <= length
    assert batch.lengths[-SCORED] >= length - 8 * SCORED


def test_lengths_and_facts_that_cannot_be(processor):
    with pytest.raises(ValueError, match="needs at least"):
        gaps_for_length(10)
    with pytest.raises(ValueError, match="16 cells"):
        make_narrations(processor, [0] * 17, 1, "test", np.random.default_rng(0))


def test_text_survives_the_tokenizer(processor):
    text = "the pale line moves slowly b3 7 . read describe a1 0 ."
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.unk_token_id not in ids
    assert processor.decode(ids, skip_special_tokens=True) == text
