"""The check meets what the first batch would meet: sizes, placeholders, words, templates, errors of any class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_processors import internvl, llava_onevision
from PIL import Image
from tiny_training import make_data, read_rows, write_rows

from keepsight.data.check import CheckedData, check_dataset, load_dataset_any
from keepsight.data.collate import ConversationCollator
from keepsight.data.rehearsal import Rehearsal
from keepsight.lab.reference import build_processor

PROCESSORS = {"qwen3_vl": build_processor, "internvl": internvl, "llava_onevision": llava_onevision}


def rehearsed(
    path: Path, collator: ConversationCollator | None, kind: Any = "chat", count: bool = False
) -> CheckedData:
    rehearsal = Rehearsal(collator, kind == "chat", count=count)
    return check_dataset(load_dataset_any(path), kind=kind, rehearse=rehearsal)


def spoilt(data: Path, row: int, **changes: Any) -> Path:
    rows = read_rows(data)
    rows[row] |= changes
    return write_rows(data, rows)


def chat(question: str, answer: str = "a1 3 .") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("count", [False, True])
def test_a_picture_that_the_processor_refuses(count: bool, data: Path) -> None:
    Image.new("RGB", (2048, 9)).save(data.parent / "3.png")
    for collator in (ConversationCollator(build_processor()), None):
        ((where, what),) = rehearsed(data, collator, count=count).problems
        assert (where, what[:27]) == ("line 4", "images[0]: 2048 x 9 pixels,")


@pytest.mark.parametrize("kind", ["chat", "prompt"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_placeholder_in_words(name: str, kind: str, data: Path) -> None:
    collator = ConversationCollator(PROCESSORS[name]())
    token = collator.placeholders[0]
    parts = [{"type": "image"}, {"type": "text", "text": f"read {token}"}]
    spoilt(data, 2, messages=[{"role": "user", "content": parts}, chat("")[1]])
    ((where, what),) = rehearsed(data, collator, kind).problems
    assert (where, what.startswith(f"messages[0]: the token {token} in the words")) == ("line 3", True)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_placeholder_in_an_answer(name: str, data: Path) -> None:
    collator = ConversationCollator(PROCESSORS[name]())
    spoilt(data, 2, messages=chat("read", f"a1 {collator.placeholders[0]} ."))
    ((where, what),) = rehearsed(data, collator).problems
    assert (where, what.startswith("messages[1]: the token")) == ("line 3", True)


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<IMG_CONTEXT>", "<start_of_image>", "[IMG]"])
def test_without_a_model_the_placeholders_of_todays_models_are_known(token: str, data: Path) -> None:
    spoilt(data, 2, messages=chat("read", f"a1 {token} ."))
    ((where, what),) = rehearsed(data, None).problems
    assert (where, token in what) == ("line 3", True)


def test_words_that_the_model_does_not_know(data: Path) -> None:
    collator = ConversationCollator(build_processor())
    spoilt(data, 0, messages=chat("read", "a1 zebra ."))
    spoilt(data, 1, messages=chat("Quo vadis?"))
    spoilt(data, 2, messages=chat("read the zebra"))
    found = rehearsed(data, collator)
    assert found.problems == (
        ("line 1", "messages[1]: the model cannot write 'zebra': not in its tokenizer's vocabulary"),
        ("line 2", "messages[0]: the model cannot read 'Quo', 'vadis', '?': not in its tokenizer's vocabulary"),
    )
    assert found.told["words that the model cannot read"] == (1, {"zebra": 1})


def test_answers_to_be_rewarded_that_the_model_cannot_write_are_told(data: Path) -> None:
    spoilt(data, 1, messages=chat("read", "zebra"))
    spoilt(data, 2, messages=chat("read", "8" * 20_000))
    found = rehearsed(data, ConversationCollator(build_processor()), "prompt")
    assert found.good().told["answers that the model cannot write"] == (2, {"zebra": 1, f"{'8' * 40}...": 1})


def test_a_tokenizer_that_writes_everything_is_not_asked_again(data: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    processor = build_processor()
    old = processor.tokenizer
    letters = {letter: 100 + n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {f"{name}_token": getattr(old, f"{name}_token") for name in ("pad", "bos", "eos")}
    more = [str(token) for token in old.added_tokens_decoder.values()]
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=more, **special)
    for name in ("image", "video"):
        setattr(processor, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    spoilt(data, 0, messages=chat("読む", "é 😀"))
    found = rehearsed(data, ConversationCollator(processor))
    assert not found.problems
    assert not found.told


class Breaks(ConversationCollator):
    """A processor that fails on one conversation with an exception of its own."""

    def segments(self, messages: Any, tools: Any = None) -> Any:
        if "b1" in messages[-1]["content"][0]["text"]:
            return super().segments(messages, tools)
        raise ZeroDivisionError("image grid")


def test_any_exception_is_a_problem_of_its_row(data: Path) -> None:
    spoilt(data, 4, messages=chat("read"))
    found = rehearsed(data, Breaks(build_processor()))
    assert found.problems == (("line 5", "processing: training would stop here (ZeroDivisionError: image grid)"),)


@pytest.mark.parametrize("kind", ["chat", "prompt"])
def test_what_passes_the_rehearsal_makes_a_batch(kind: Any, tmp_path: Path) -> None:
    """And the tokens counted are those of the batch."""
    from keepsight.data.check import read_sample

    data = make_data(tmp_path / "data", 3)
    Image.new("RGB", (90, 20)).save(data.parent / "1.png")
    for build in PROCESSORS.values():
        collator = ConversationCollator(build())
        found = rehearsed(data, collator, kind, count=True).good()
        samples = [read_sample(row, found.source) for row in found.dataset]
        if kind == "chat":
            lengths = [collator([sample])["input_ids"].shape[1] for sample in samples]
            collator(samples)
        else:
            lengths = [collator.prompt_tokens(sample["messages"], sample["images"])[0] for sample in samples]
        assert found.lengths == tuple(lengths)
