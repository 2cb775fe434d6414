"""Batches: the loss is on the answers, prompts are tokenized as `generate` does, with every family's processor."""

from __future__ import annotations

import pytest
import torch
import transformers
from family_processors import internvl, llava_onevision
from PIL import Image

from keepsight.data.collate import IGNORED, ConversationCollator, TemplateError
from keepsight.lab.reference import build_processor

PROCESSORS = {"qwen3_vl": build_processor, "internvl": internvl, "llava_onevision": llava_onevision}


def image(width: int) -> Image.Image:
    return Image.new("RGB", (width, 12), "white")


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


TWO_TURNS = [
    {"role": "user", "content": [{"type": "image"}, text("read")]},
    {"role": "assistant", "content": [text("a1 3 .")]},
    {"role": "user", "content": [{"type": "image"}, text("describe")]},
    {"role": "assistant", "content": [text("b1 4 .")]},
]
ROWS = [
    {"messages": TWO_TURNS, "images": [image(12), image(24)]},
    {"messages": TWO_TURNS[:2], "images": [image(24)]},
]


@pytest.mark.parametrize("name", PROCESSORS)
def test_batches_are_what_the_processor_makes_and_labels_are_the_answers(name: str) -> None:
    processor = PROCESSORS[name]()
    batch = ConversationCollator(processor)(ROWS)
    whole = processor(
        text=[processor.apply_chat_template(row["messages"], tokenize=False) for row in ROWS],
        images=[row["images"] for row in ROWS],
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    assert batch.keys() - {"labels"} == set(whole)
    for key in whole:
        assert torch.equal(torch.as_tensor(whole[key]), torch.as_tensor(batch[key])), key
    learned = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    said = [
        processor.tokenizer.decode(ids[keep]).split() for ids, keep in zip(batch["input_ids"], learned, strict=True)
    ]
    assert said == [["a1", "3", ".", "<eos>", "b1", "4", ".", "<eos>"], ["a1", "3", ".", "<eos>"]]


def test_a_prompt_is_tokenized_as_for_generation() -> None:
    processor = build_processor()
    batch = ConversationCollator(processor)(ROWS[1:])
    prompt = processor.apply_chat_template(TWO_TURNS[:1], tokenize=False, add_generation_prompt=True)
    ids = processor(text=[prompt], images=[[image(24)]], add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(batch["input_ids"][:, : ids.shape[1]], ids)
    assert (batch["labels"][:, : ids.shape[1]] == IGNORED).all()
    assert (batch["labels"][:, ids.shape[1] :] != IGNORED).all()


@pytest.mark.parametrize("name", PROCESSORS)
def test_cutting_keeps_every_image(name: str) -> None:
    collator = ConversationCollator(PROCESSORS[name]())
    length, needed = collator.measure(ROWS[0])
    assert length == collator(ROWS[:1])["input_ids"].shape[1]
    short = ConversationCollator(collator.processor, max_length=needed + 1)(ROWS[:1])
    whole = collator(ROWS[:1])
    assert torch.equal(short["input_ids"], whole["input_ids"][:, : needed + 1])
    assert (short["labels"] != IGNORED).any()
    # One token less than needed would cut an image, or every word to learn.
    shorter = whole["labels"][:, : needed - 1]
    images = collator.visual_positions(whole["input_ids"][0])
    assert (images >= needed - 1).any() or (shorter == IGNORED).all()


def test_a_model_that_reads_questions_both_ways() -> None:
    """PaliGemma, whatever chat template it is given: its answers would see themselves."""
    processor = transformers.PaliGemmaProcessor(
        transformers.SiglipImageProcessor(size={"height": 16, "width": 16}, image_seq_length=16),
        build_processor().tokenizer,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )
    with pytest.raises(TemplateError, match="in both directions"):
        ConversationCollator(processor)


def test_no_chat_template() -> None:
    processor = build_processor()
    processor.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        ConversationCollator(processor)


def test_a_template_that_rewrites_earlier_turns() -> None:
    processor = build_processor()
    # As reasoning models do: an answer is only written out while it is the last message.
    processor.chat_template = (
        "{%- for m in messages -%}{{m['role']}}{%- if m['role']!='assistant' or loop.last -%}"
        "{%- for p in m['content'] -%}{{p['text'] if p['type']=='text' else '<|image_pad|>'}}{%- endfor -%}"
        "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}assistant{%- endif -%}"
    )
    collator = ConversationCollator(processor)
    assert [trained for _, trained in collator.segments(TWO_TURNS[:2])] == [False, True]
    with pytest.raises(TemplateError, match="a sample of its own"):
        collator.segments(TWO_TURNS)
