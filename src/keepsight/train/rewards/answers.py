"""Compare answers: choice letters, numbers, LaTeX and plain words, for rewards and for evaluation.

What can be told by reading (the same words, a choice letter, a plain number) is decided here. Formulas go to
math-verify, a maintained checker, in a process of its own: its time limit is a signal alarm, which only a main thread
can set and which cannot break into the power of two large numbers. A process can always be ended.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

from keepsight.installed import MissingExtraError

_WRAPPED = re.compile(r"^(?:\\boxed|\\text|\\mathrm|\\mathbf|\\textbf)\s*\{(.*)\}$", re.DOTALL)
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_LEAD = re.compile(r"^(?:the\s+)?(?:correct\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*", re.IGNORECASE)
_CHOICE = re.compile(r"^(?:\(([A-Za-z])\)|([A-Za-z])[.:)]|([A-Za-z])$)\s*(.*)$", re.DOTALL)
_NUMBER = re.compile(r"^[-+]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?$")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_FUNCTIONS = re.compile(r"\b(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|frac|inf)\b")
_LONGEST = 2000  # characters of a formula that is still worth a parser's time


def same_answer(given: Any, expected: Any, seconds: float = 5.0) -> bool:
    r"""Whether an answer is the expected one.

    - The same words are right, whatever their case, spacing, final full stop or wrapping in `$...$` and `\boxed{...}`.
    - If a choice letter is expected ("B", "(B)", "B. a cat"), the letter decides: "B", "(b)", "B. anything". Where the
      expected answer brings the choice's words, they alone are right, too.
    - Numbers and formulas are compared by value: "1,000" and "1000.0", "1/2" and "\frac{1}{2}", "x+1" and "1+x".
    - Anything else must be the same words.

    Args:
        given: what the model answered: text, or a number.
        expected: the right answer: text, a number, or a list of answers any of which is right.
        seconds: how long a formula may take to compare; one that takes longer counts as wrong.

    Raises:
        ImportError: if a formula is to be compared and math-verify is not installed.
    """
    if isinstance(expected, (list, tuple)):
        return any(same_answer(given, one, seconds) for one in expected)
    said, right = _plain(str(given)), _plain(str(expected))
    if not said or not right:
        return False
    if _words(said) == _words(right):
        return True
    choice = _choice(right)
    if choice is not None:
        letter, words = choice
        mine = _choice(_LEAD.sub("", said))
        return (mine is not None and mine[0] == letter) or bool(words and _words(said) == _words(words))
    if _NUMBER.match(said) and _NUMBER.match(right):
        return _value(said) == _value(right)
    if not _is_formula(right) or max(len(said), len(right)) > _LONGEST:
        return False
    return _CHECKER.same(said, right, seconds)


def _plain(text: str) -> str:
    """Without spaces around it, math delimiters, boxes and a final full stop."""
    before = None
    while text != before:
        before = text
        text = text.strip().removesuffix(".").strip()
        for start, end in _DELIMITERS:
            if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
                inner = text[len(start) : -len(end)]
                text = text if start in inner else inner
        wrapped = _WRAPPED.match(text)
        if wrapped and _balanced(wrapped[1]):
            text = wrapped[1]
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def _words(text: str) -> str:
    return re.sub(r"\s*,\s*", ",", " ".join(text.split())).casefold()


def _choice(text: str) -> tuple[str, str] | None:
    """(letter, the words behind it) of "B", "(B)", "B." or "B) a cat"; None for anything else."""
    found = _CHOICE.match(text)
    if found is None:
        return None
    return next(letter for letter in found.groups()[:3] if letter).upper(), found[4].strip()


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _is_formula(text: str) -> bool:
    """Numbers and formulas, but no words: in "3 cats" the cats count as well."""
    bare = _FUNCTIONS.sub("", _COMMAND.sub("", text))
    return bool(re.search(r"[\d\\=^+*/<>√π∞]", text)) and not re.search(r"[^\W\d_]{3,}", bare)


class _Checker:
    """math-verify in a process of its own, started when first needed and ended when it takes too long."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.registered = False

    def same(self, given: str, expected: str, seconds: float) -> bool:
        with self.lock:
            if self.process is not None and self.process.poll() is not None:
                self._end()
            process = self.process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            alarm = threading.Timer(seconds, process.kill)
            alarm.start()
            try:
                process.stdin.write(json.dumps([given, expected]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            finally:
                alarm.cancel()
            if not line:  # it took too long
                self._end()
            return line.strip() == "true"

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtraError("Comparing formulas needs math-verify.", "train")
        script = Path(__file__).with_name("answer_process.py")
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=null, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # it has imported what it needs; from here on time counts
        if not self.registered:
            atexit.register(self._end)
            self.registered = True
        self.process = process
        return process

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()  # type: ignore[union-attr]
            self.process = None


_CHECKER = _Checker()
