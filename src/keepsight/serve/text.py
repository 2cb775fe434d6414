"""Tokens to text, as they come: no half characters, nothing of a stop string.

What a client gets without streaming is the sum of the pieces that it would have got with it, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CUT = "\ufffd"  # what a tokenizer writes for a character whose bytes are not complete


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: decodes; special tokens are left out.
        stop: texts that end the answer and do not belong to it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = self._read = 0  # of the window that is decoded: from where, and up to where it has been given out
        self._waiting = ""  # text that may turn out to begin a stop string
        self._given = 0  # characters that went out
        self._entries: list[tuple[int, int, Any]] = []  # (where its text begins, where it ends, what goes with a token)
        self.is_stopped = False

    @property
    def length(self) -> int:
        """Characters so far."""
        return self._given + len(self._waiting)

    def push(self, token: int, entry: Any = None) -> tuple[str, list[Any]]:
        """Add a token.

        Args:
            token: its id.
            entry: what goes with it (its log-probabilities); it comes out when the token's text does.

        Returns:
            (text that is certain now, entries of the tokens that it completes).
        """
        assert not self.is_stopped
        self._ids.append(token)
        begin = self.length
        piece = self._piece()
        self._waiting += piece
        if entry is not None:
            self._entries.append((begin, self.length, entry))
        return self._release(len(self._waiting) - self._held_back())

    def finish(self) -> tuple[str, list[Any]]:
        """The rest, when the answer ends for another reason than a stop string."""
        if self.is_stopped:
            return "", []
        self._waiting += self._piece(is_last=True)
        return self._release(len(self._waiting))

    def _piece(self, is_last: bool = False) -> str:
        """Text that the latest tokens add. A window of few tokens is decoded, because a token's text can depend on the
        token before it (a space, half a character), and the whole would take ever longer."""
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if not is_last and after.endswith(_CUT) and len(self._ids) - self._read < 8:
            return ""
        piece = after[len(before) :]
        if piece:  # else special tokens only, and the window must keep a token that has text
            self._start = self._read
        self._read = len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _held_back(self) -> int:
        """Characters at the end that may begin a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for size in range(min(longest, len(self._waiting)), 0, -1):
            if any(s.startswith(self._waiting[-size:]) for s in self.stop if len(s) > size):
                return size
        return 0

    def _release(self, count: int) -> tuple[str, list[Any]]:
        """Give out so many characters, or those before a stop string."""
        found = [i for i in (self._waiting.find(s) for s in self.stop) if i >= 0]
        self.is_stopped = bool(found)
        count = min(found, default=count)
        text, self._waiting = self._waiting[:count], self._waiting[count:]
        self._given += len(text)
        if self.is_stopped:  # tokens that belong to the stop string are not reported
            self._waiting = ""
            done = [e for b, _, e in self._entries if b < self._given]
            self._entries = []
            return text, done
        done = [e for _, end, e in self._entries if end <= self._given]
        self._entries = [entry for entry in self._entries if entry[1] > self._given]
        return text, done
