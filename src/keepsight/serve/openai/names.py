"""What single tokens are called in log-probabilities: their text, and their bytes."""

from __future__ import annotations

import functools
import re
from typing import Any

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # a byte of its own, in SentencePiece's vocabularies


@functools.cache
def _alphabet() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (GPT-2's, Qwen's): printable bytes stand for
    themselves, the others for letters from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


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
        letters = _alphabet()
        return bytes(letters[c] for c in word) if all(c in letters for c in word) else text.encode()
