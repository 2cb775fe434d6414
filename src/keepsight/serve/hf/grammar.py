"""Answers held to a JSON schema or a regular expression: which tokens may come next, by llguidance.

Memory is no text: a grammar neither forbids an invocation nor reads a memory's positions, so a memory can go in
anywhere, and the text around it is what the schema says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

import torch

from keepsight.serve.errors import ApiError, bad

#: White space stands around commas and colons only, and is bounded: small models fill an answer with it. (Its
#: `whitespace_pattern` would say so for all places; llguidance 1.7, which vLLM asks for, takes no notice of it.)
_SPACE = r"[ \n\r\t]{0,16}"
_FORM = {
    "whitespace_flexible": False,
    "item_separator": f"{_SPACE},{_SPACE}",
    "key_separator": f"{_SPACE}:{_SPACE}",
}


class Grammars:
    """Makes the grammars of one tokenizer. Any thread may call it.

    Args:
        tokenizer: a fast one.
        vocabulary: V, token ids there are logits for.
        ends: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]):
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, frozenset(ends)
        added = tokenizer.added_tokens_decoder.items()
        self._no_text = {i for i, token in added if token.special} | set(tokenizer.all_special_ids)
        self._lock = threading.Lock()
        self._inner: Any = None

    def compile(self, schema: dict[str, Any], param: str) -> Grammar:
        """The grammar of a JSON schema, at its beginning.

        Args:
            schema: an object, as it came.
            param: where it stands in the request, for errors.

        Raises:
            ApiError: 400 if the schema is none, uses what is not supported, or cannot be begun with these tokens.
        """
        from llguidance import LLMatcher

        told = json.dumps({**schema, "x-guidance": _FORM})
        inner = self._readable(param)
        wrong = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(told), inner)
        if wrong:
            raise bad(f"{param}: this schema cannot be used: {' '.join(wrong.split())[:300]}.", param, "invalid_schema")
        return self._begin("json", f"json: %json {told}", param)

    def compile_regex(self, pattern: str, param: str) -> Grammar:
        """The grammar of all texts that a regular expression matches from end to end, at its beginning.

        Args:
            pattern: in llguidance's syntax, which is that of Rust's regex: no look-around, no back-references.
            param: where it stands in the request, for errors.

        Raises:
            ApiError: 400 if it is none, or cannot be begun with these tokens.
        """
        from llguidance import LLMatcher

        made = LLMatcher.grammar_from_regex(pattern)
        wrong = LLMatcher.validate_grammar(made, self._readable(param))
        if wrong:
            told = " ".join(wrong.split())[:300]
            raise bad(f"{param}: this regular expression cannot be used: {told}.", param, "invalid_regex")
        return self._begin(json.loads(made)["grammars"][0]["lark_grammar"].removeprefix("start: "), "", param)

    def _readable(self, param: str) -> Any:
        """The tokenizer as llguidance reads it."""
        with self._lock:
            if self._inner is None:
                self._inner = _readable(self._tokenizer, self._vocabulary, sorted(self._ends), param)
            return self._inner

    def _begin(self, written: str, rules: str, param: str) -> Grammar:
        """The grammar of what is written, by rules in llguidance's form of Lark."""
        from llguidance import LLMatcher

        space = ' " "?' if _is_joined_by_spaces(self._tokenizer) else ""
        matcher = LLMatcher(self._readable(param), LLMatcher.grammar_from_lark(f"start: {written}{space}\n{rules}"))
        size = max(self._vocabulary, len(self._tokenizer))
        grammar = Grammar(matcher, size, self._ends, self._no_text, param)
        grammar.allowed()
        return grammar


class Grammar:
    """How far one answer has come.

    Args:
        matcher: llguidance's.
        size: V, ids there are.
        ends: ids that end an answer.
        no_text: ids of all special tokens.
        param: where the schema stands in the request, for errors.
    """

    def __init__(self, matcher: Any, size: int, ends: frozenset[int], no_text: set[int], param: str):
        self._matcher, self._size, self._ends, self._no_text, self._param = matcher, size, ends, no_text, param

    def copy(self) -> Grammar:
        """The same for another answer."""
        return Grammar(self._matcher.deep_copy(), self._size, self._ends, self._no_text, self._param)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """Bool [V], on the CPU: the tokens that may come next.

        Raises:
            ApiError: 400 if there are none.
        """
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()[: self._size]
        # Where nothing fits, llguidance allows a special token; and an end is one only where the text may end.
        mask[[i for i in self._no_text if i < len(mask)]] = False
        if self._matcher.is_accepting():
            mask[[i for i in self._ends if i < len(mask)]] = True
        if not bool(mask.any()):
            raise bad(
                f"{self._param}: this model's vocabulary has no token that could come next in such an answer. Another "
                "schema, or a model that can write all characters.",
                self._param,
                "unwritable_schema",
            )
        return mask

    def constrained(self, logits: torch.Tensor, free: Collection[int]) -> torch.Tensor:
        """Logits [1, V] without what the schema forbids.

        Args:
            logits: left as they are.
            free: ids that are no text, and that it does not concern.

        Raises:
            ApiError: 400 if no token is left.
        """
        mask = torch.zeros(logits.shape[-1], dtype=torch.bool)
        found = self.allowed()[: len(mask)]
        mask[: len(found)] = found
        mask[list(free)] = True
        return logits.masked_fill(~mask.to(logits.device), -torch.inf)

    def write(self, token: int) -> None:
        """Go on by a token that was chosen.

        Raises:
            ApiError: 500 if it does not fit: an error of the grammar's own, such as a limit on its size.
        """
        if not self._matcher.consume_token(token):
            raise ApiError(
                500,
                f"{self._param}: the answer could not be held to the schema: {self._matcher.get_error()[:300]}",
                param=self._param,
                code="schema_failure",
            )


def _is_joined_by_spaces(tokenizer: Any) -> bool:
    """Whether every token is a word, as with the built-in model: tokenizers joins them where nothing else is said."""
    return tokenizer.backend_tokenizer.decoder is None


def _readable(tokenizer: Any, vocabulary: int, ends: list[int], param: str) -> Any:
    """The tokenizer as llguidance reads it."""
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    if not hasattr(tokenizer, "backend_tokenizer"):
        raise bad(f"{param}: this model's tokenizer is none of the fast ones, which it needs.", param)
    size = max(vocabulary, len(tokenizer))
    if not _is_joined_by_spaces(tokenizer):
        return from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)

    return LLTokenizer(TokenizerWrapper(_Words(tokenizer, size)), eos_token=ends, slices=[])


class _Words:
    """A tokenizer of whole words as llguidance asks for it: every word ends with the space that joins it to the next,
    so that "a" is no beginning of "a1". Behind the model's ids stand the 256 bytes: what must come next can be the
    beginning of several words, and llguidance wants to name it.

    Args:
        tokenizer: of the model.
        size: ids there are.
    """

    def __init__(self, tokenizer: Any, size: int):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.special_token_ids = tokenizer.all_special_ids
        known = min(size, len(tokenizer))
        words = [f"{word} ".encode() for word in tokenizer.convert_ids_to_tokens(range(known))]
        self._ids, self._first_byte = {word: i for i, word in enumerate(words)}, size
        self.tokens = [*words, *[b""] * (size - known), *(bytes([i]) for i in range(256))]

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text: of its words, and of the bytes of what is none."""
        *parts, last = text.split(b" ")
        ids: list[int] = []
        for part in (part + b" " for part in parts):
            whole = self._ids.get(part)
            ids += [self._first_byte + byte for byte in part] if whole is None else [whole]
        return ids + [self._first_byte + byte for byte in last]
