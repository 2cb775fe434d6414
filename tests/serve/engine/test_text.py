"""Tokens to text as they come: the pieces are the whole, no half characters, nothing of a stop text."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

from keepsight.serve.openai.names import TokenNames
from keepsight.serve.text import TextStream
from keepsight.shipped import resolve_base

TEXTS = ["plain words, and more of them", "naïve café – ☕️ 🧑‍🚀🚀 日本語テキスト", "äöü", "🚀", "a\n\n b  c ", ""]


@pytest.fixture(scope="module")
def by_bytes():
    """A tokenizer with one token per byte, so that most characters take several tokens."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet | {"<end>": 256}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.fixture(scope="module")
def by_words():
    return AutoProcessor.from_pretrained(resolve_base("keepsight/reference")).tokenizer


def pieces_of(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces, entries = [], []
    for position, token in enumerate(ids):
        text, found = stream.push(token, position)
        pieces.append(text)
        entries += found
        if stream.is_stopped:
            break
    text, found = stream.finish()
    return [*pieces, text], [*entries, *found], stream


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole_text_and_no_half_characters(by_bytes, text):
    ids = by_bytes.encode(text, add_special_tokens=False)
    pieces, entries, _ = pieces_of(by_bytes, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert entries == list(range(len(ids)))


def test_broken_bytes_do_not_stop_the_text(by_bytes):
    ids = by_bytes.encode("ä", add_special_tokens=False)[:1] * 30 + by_bytes.encode("end", add_special_tokens=False)
    pieces, _, _ = pieces_of(by_bytes, ids)
    assert "".join(pieces).endswith("end")
    assert any(pieces[:20])


def test_words_with_special_tokens_between(by_words):
    rng = random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(len(by_words)) for _ in range(30)]
        pieces, _, _ = pieces_of(by_words, ids)
        assert "".join(pieces) == by_words.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", ["by_bytes", "by_words"])
def test_stop_texts(tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer)
    rng = random.Random(1)
    hits = 0
    for _ in range(60):
        ids = tokenizer.encode(" ".join(rng.choice(["read", "the", "a1", "8", "."]) for _ in range(12)))
        ids = [i for i in ids if i not in tokenizer.all_special_ids]
        whole = tokenizer.decode(ids)
        stops = [rng.choice([". a1", "8 8", "the the", "zebra", "1 ."]) for _ in range(2)]
        places = [whole.find(stop) for stop in stops if stop in whole]
        pieces, entries, stream = pieces_of(tokenizer, ids, stops)
        assert stream.is_stopped == bool(places)
        hits += bool(places)
        expected = whole[: min(places)] if places else whole
        assert "".join(pieces) == expected
        shown = tokenizer.decode([ids[entry] for entry in entries])
        assert entries == list(range(len(entries)))
        assert shown.startswith(expected.rstrip())
    assert 10 < hits < 60


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(by_bytes, text):
    ids = by_bytes.encode(text, add_special_tokens=False)
    names = TokenNames(by_bytes)
    assert b"".join(map(names.bytes, ids)).decode() == text


def test_bytes_of_a_token_that_has_none(by_words):
    names = TokenNames(by_words)
    assert all(names.bytes(i).decode() == names.text(i) for i in range(len(by_words)))
