"""What the first batch would do to a sample, done before training: a model's processor and chat template, rehearsed.

Where no model is named, what all of them would stumble over is looked for: placeholder tokens in words, and pictures so
long that Qwen's processors refuse them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from keepsight.data.conversations import TEMPLATE_KEYS
from keepsight.data.errors import DataError
from keepsight.data.tables.files import short
from keepsight.errors import KeepsightError

if TYPE_CHECKING:
    from keepsight.data.collate import ConversationCollator

_PLACEHOLDERS = re.compile(
    r"<\|(?:image|video|vision|audio)_?\w*\|>|<\|(?:begin|end)_of_(?:image|video)\|>|<IMG_CONTEXT>|<image_soft_token>"
    r"|<(?:start|end)_of_image>|\[IMG\]"
)
"""Tokens that stand for pictures in the models of today."""
_LONGEST = 200
"""Sides' ratio above which the processors of Qwen's VLMs refuse a picture."""
_HOW_MANY_WORDS = 5
_SHOWN = 40  # characters of a word that is told of


@dataclass(frozen=True)
class Rehearsed:
    """What was found.

    Attributes:
        length: tokens after processing; None where they were not counted.
        needed: how many of them must not be cut.
        told: subject -> words about it, of what is no fault.
        ignored: keys of messages, and "tools", that the chat template does not write.
    """

    length: int | None = None
    needed: int = 0
    told: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


class Rehearsal:
    """Runs a sample through a processor as training will.

    Args:
        collator: of the model's processor; None where no model is named.
        answered: whether answers are learned (else the model writes them).
        count: process every sample, to count its tokens; otherwise only every size of image.
        ignore: what the user said is not to be used.
    """

    def __init__(
        self,
        collator: ConversationCollator | None,
        answered: bool = True,
        count: bool = False,
        ignore: tuple[str, ...] = (),
    ):
        self.collator, self.answered, self.count, self.ignore = collator, answered, count, ignore
        self._sizes: dict[tuple[int, int], str | None] = {}
        self._writes_all = collator is None or not self._unknown("é 漢 😀 ж q")[0]

    def __call__(self, sample: dict[str, Any], images: list[Any] | None) -> Rehearsed:
        """Rehearse one sample.

        Args:
            sample: as `samples.sample_reader` makes it. Keys that the template does not write, and that are to be
                ignored, are taken out.
            images: PIL images; None where they were not opened.

        Raises:
            DataError: naming the message or image that training would fail on.
        """
        ignored = self._unused(sample)
        self._check_words(sample)
        told = self._check_vocabulary(sample)
        texts = [text for _, _, text in _texts(sample)]
        special = tuple(token for token in self._specials if any(token in text for text in texts))
        told |= {"special tokens in the words, read as such": special} if special else {}
        for index, image in enumerate(images or ()):
            self._check_size(index, image)
        if self.collator is None:
            depends = {key for message in sample["messages"] for key in TEMPLATE_KEYS if key in message}
            depends |= {"tools"} & set(sample) | {"system"} & {sample["messages"][0]["role"]}
            told |= {"used if its chat template writes it (--model tells)": tuple(sorted(depends))}
            return Rehearsed(told=told, ignored=tuple(ignored))
        if self.count and images is not None:
            length, needed = self._length(sample, images)
            return Rehearsed(length, needed, told, tuple(ignored))
        self._written(sample["messages"], sample.get("tools"))  # raises where the template cannot write it
        return Rehearsed(told=told, ignored=tuple(ignored))

    def _written(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        assert self.collator is not None
        if self.answered:
            return "".join(text for text, _ in self.collator.segments(messages, tools))
        return self.collator.render(messages, tools, add_generation_prompt=True)

    def _length(self, sample: dict[str, Any], images: list[Any]) -> tuple[int, int]:
        assert self.collator is not None
        if self.answered:
            return self.collator.measure({**sample, "images": images})
        length, _ = self.collator.prompt_tokens(sample["messages"], images)
        return length, length  # of a prompt nothing can be cut

    def _unused(self, sample: dict[str, Any]) -> list[str]:
        """Keys that the template does not write: refused, or taken out where that was asked for."""
        messages, tools = sample["messages"], sample.get("tools")
        unused = []
        for key in TEMPLATE_KEYS:
            having = [index for index, message in enumerate(messages) if key in message]
            if not having:
                continue
            if key in self.ignore:
                wanted = False
            else:
                without = [{k: v for k, v in message.items() if k != key} for message in messages]
                wanted = self.collator is None or self._written(messages, tools) != self._written(without, tools)
            if not wanted:
                self._may_ignore(key, f"messages[{having[0]}]")
                for index in having:
                    del messages[index][key]
                unused.append(f"{key} of messages")
        if tools and self.collator is not None and self._written(messages, tools) == self._written(messages):
            self._may_ignore("tools", "tools")
            sample.pop("tools")
            unused.append("tools")
        if self.collator is not None:
            self._check_system(messages, tools)
        return unused

    def _may_ignore(self, key: str, where: str) -> None:
        if key not in self.ignore and key not in ("name", "tool_call_id"):  # which say who, not what
            raise DataError(
                f"{where}: {key}, which this model's chat template does not write, so nobody would see it",
                f"To do without: --ignore {key}.",
            )

    def _check_system(self, messages: list[dict[str, Any]], tools: Any) -> None:
        """Some templates drop system messages."""
        if messages[0]["role"] == "system" and len(messages) > 1:
            said = "".join(part.get("text", "") for part in messages[0]["content"]).strip()
            if said and said not in self._written(messages, tools):
                raise DataError(
                    "messages[0]: the system's message, which this model's chat template does not write",
                    "To do without: --ignore system. Or put its words into the question.",
                )

    def _check_words(self, sample: dict[str, Any]) -> None:
        """Placeholder tokens in words would be taken for pictures."""
        texts = [(f"messages[{index}]", text) for index, _, text in _texts(sample)]
        for where, text in (*texts, *(("answer", one) for one in _answers(sample) if isinstance(one, str))):
            found = _PLACEHOLDERS.search(text) if self.collator is None else None
            token = found[0] if found else self._placeholder(text)
            if token:
                raise DataError(
                    f"{where}: the token {token} in the words; the model takes it for a picture",
                    'Pictures are marked by {"type": "image"} (or <image> in a question). Write the token in another '
                    "way, or leave the sample out.",
                )

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        """Special tokens: a tokenizer makes one token of them in words too, as if a template had put it."""
        if self.collator is None:
            return ()
        return tuple(str(token) for token in self.collator.tokenizer.added_tokens_decoder.values() if token.special)

    def _placeholder(self, text: str) -> str | None:
        """A token of the text that stands for a picture to this processor."""
        if self.collator is None or not any(mark in text for mark in "<["):
            return None
        return next((token for token in self.collator.placeholders if token in text), None)

    def _check_vocabulary(self, sample: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Words that the tokenizer has not: refused in answers to learn, and where a message has few others."""
        if self._writes_all:
            return {}
        told: dict[str, tuple[str, ...]] = {}
        if not self.answered:
            missing = [word for one in _answers(sample) if one is not None for word in self._unknown(str(one))[0]]
            if missing:
                told["answers that the model cannot write"] = tuple(missing)
        for index, role, text in _texts(sample):
            missing, known = self._unknown(text)
            if not missing:
                continue
            learned = role == "assistant" and self.answered
            if learned or len(missing) > known:
                words = ", ".join(map(repr, list(dict.fromkeys(missing))[:_HOW_MANY_WORDS]))
                raise DataError(
                    f"messages[{index}]: the model cannot {'write' if learned else 'read'} {words}: not in its "
                    "tokenizer's vocabulary",
                    "Train a model that knows such words (most know all; the built-in one knows a few dozen).",
                )
            told["words that the model cannot read"] = (*told.get("words that the model cannot read", ()), *missing)
        return told

    def _unknown(self, text: str) -> tuple[list[str], int]:
        """(what the tokenizer has no token for, how many tokens it has for the rest)."""
        assert self.collator is not None
        tokenizer = self.collator.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            unknown = sum(i == tokenizer.unk_token_id for i in ids)
            return ["?"] * unknown, len(ids) - unknown
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        missing, known, end = [], 0, 0
        for token, (begin, until) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            missing += text[end:begin].split()
            if token == tokenizer.unk_token_id and tokenizer.unk_token_id is not None:
                missing.append(text[begin:until])
            else:
                known += 1
            end = max(end, until)
        missing += text[end:].split()
        return [word if len(word) <= _SHOWN else f"{word[:_SHOWN]}..." for word in missing], known

    def _check_size(self, index: int, image: Any) -> None:
        size = image.size
        if size not in self._sizes:
            self._sizes[size] = self._refusal(image)
        if self._sizes[size] is not None:
            raise DataError(
                f"images[{index}]: {size[0]} x {size[1]} pixels, {self._sizes[size]}", "Cut or resize such pictures."
            )

    def _refusal(self, image: Any) -> str | None:
        """Why the processor does not take a picture of this size; None if it does."""
        if self.collator is None:
            ratio = max(image.size) / min(image.size)
            return (
                None if ratio <= _LONGEST else f"{ratio:.0f} times as long as wide; Qwen's VLMs take up to {_LONGEST}"
            )
        words = [{"type": "image"}, {"type": "text", "text": "."}]
        try:
            self.collator.prompt_tokens([{"role": "user", "content": words}], [image])
        except KeepsightError:
            raise
        except Exception as error:
            return f"which this model's processor refuses ({short(error)})"
        return None


def _texts(sample: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """(message, its role, text) of all words."""
    for index, message in enumerate(sample["messages"]):
        for part in message["content"]:
            if part["type"] == "text":
                yield index, message["role"], part["text"]


def _answers(sample: dict[str, Any]) -> Sequence[Any]:
    """The reference answers, of whatever kind; one of None where there are none."""
    found = sample.get("answer")
    return found if isinstance(found, (list, tuple)) else [found]
