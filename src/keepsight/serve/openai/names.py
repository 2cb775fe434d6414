"""What single tokens are called in log-probabilities: their text, and their bytes."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte of its own, in SentencePiece's vocabularies


#: The letters that stand for bytes in byte-level vocabularies (GPT-2's, Qwen's).
_LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


class TokenNames:
    """Names of tokens.

    Args:
        tokenizer: used by one thread at a time.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """Its text. Bytes that are no whole character become U+FFFD."""
        return self._tokenizer.decode([token])

    def bytes(self, token: int) -> bytes:
        """Its bytes, so that the bytes of an answer's tokens are those of its text even where a character takes
        several tokens."""
        text = self.text(token)
        if "\ufffd" not in text:
            return text.encode()
        word = self._tokenizer.convert_ids_to_tokens(token)
        single = _FALLBACK.fullmatch(word)
        if single:
            return bytes([int(single[1], 16)])
        return bytes(_LETTERS[c] for c in word) if all(c in _LETTERS for c in word) else text.encode()
