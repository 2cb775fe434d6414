"""Answers held to a JSON schema: which tokens may come next, by llguidance.

Memory is no text: a grammar neither forbids an invocation nor reads a memory's positions, so a memory can go in
anywhere, and the text around it is what the schema says.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from types import SimpleNamespace
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
        with self._lock:
            if self._inner is None:
                self._inner = _readable(self._tokenizer, self._vocabulary, sorted(self._ends), param)
        space = '" "? ' if _is_joined_by_spaces(self._tokenizer) else ""
        wrong = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(told), self._inner)
        if wrong:
            raise bad(f"{param}: this schema cannot be used: {' '.join(wrong.split())[:300]}.", param, "invalid_schema")
        matcher = LLMatcher(self._inner, LLMatcher.grammar_from_lark(f"start: {space}json\njson: %json {told}"))
        grammar = Grammar(matcher, self._ends, self._no_text, param)
        grammar.allowed()
        return grammar


class Grammar:
    """How far one answer has come.

    Args:
        matcher: llguidance's.
        ends: ids that end an answer.
        no_text: ids of all special tokens.
        param: where the schema stands in the request, for errors.
    """

    def __init__(self, matcher: Any, ends: frozenset[int], no_text: set[int], param: str):
        self._matcher, self._ends, self._no_text, self._param = matcher, ends, no_text, param

    def copy(self) -> Grammar:
        """The same for another answer."""
        return Grammar(self._matcher.deep_copy(), self._ends, self._no_text, self._param)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor:
        """Bool [V], on the CPU: the tokens that may come next.

        Raises:
            ApiError: 400 if there are none.
        """
        mask = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
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

    words = SimpleNamespace(
        eos_token_id=ends[0],
        bos_token_id=tokenizer.bos_token_id,
        special_token_ids=tokenizer.all_special_ids,
        tokens=[f" {tokenizer.convert_ids_to_tokens(i)}".encode() if i < len(tokenizer) else b"" for i in range(size)],
    )
    # What would encode is asked only for tokens that could be skipped, and none is here.
    return LLTokenizer(TokenizerWrapper(words), eos_token=ends, slices=[])
