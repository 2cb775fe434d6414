"""From conversations to batches: what the model reads, and which of its words the loss counts.

The loss is on every assistant message and on nothing else (paper, section 5: cross-entropy on the completion). Prompts
are tokenized exactly as `generate` would: by the processor's own chat template up to the point where the model starts
to answer. Works with every processor that has a chat template; the template needs no special markers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from keepsight import compat
from keepsight.errors import KeepsightError

IGNORED = -100
_VISUAL_IDS = ("image_token_id", "image_ids", "video_token_id")
"""Where processors keep the ids of their placeholder tokens."""


class TemplateError(KeepsightError):
    """The processor's chat template cannot be used for training."""


class ConversationCollator:
    """Turns samples {"messages", "images"} into a batch for the model.

    Args:
        processor: a transformers processor with a tokenizer and a chat template.
        max_length: cut longer rows at the end (the check before training makes sure that this costs answer text only).

    Raises:
        TemplateError: if the processor has no chat template, or one that changes earlier turns.
    """

    def __init__(self, processor: Any, max_length: int | None = None):
        require_chat_template(processor)
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """To `input_ids`, `attention_mask`, `labels` [B, T] (padded on the right) and the processor's pixels."""
        return self._batch(samples, self.max_length)

    def _batch(self, samples: list[dict[str, Any]], max_length: int | None) -> dict[str, torch.Tensor]:
        segments = [self.segments(sample["messages"], sample.get("tools")) for sample in samples]
        mark = self._mark(segments)
        texts = ["".join(mark if trained else text for text, trained in row) for row in segments]
        images: Any = [sample["images"] for sample in samples]
        encoded = self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="right",
            add_special_tokens=False,  # the chat template has written them
            return_tensors="pt",
        )
        return self._with_answers(dict(encoded), segments, mark, max_length)

    def segments(self, messages: list[dict[str, Any]], tools: Any = None) -> list[tuple[str, bool]]:
        """A conversation as the chat template writes it, cut into (text, whether the model should learn to say it).

        A message with "weight": 0 is read and not learned. `tools` are for the templates that write them.
        """
        full = self.render(messages, tools)
        result, position = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head = self.render(messages[:index], tools, add_generation_prompt=True)
            upto = self.render(messages[: index + 1], tools)
            if not (full.startswith(head) and full.startswith(upto) and len(head) < len(upto)):
                raise TemplateError(
                    "The processor's chat template writes earlier turns differently once later ones follow (reasoning "
                    "models drop their thoughts, for example), so the words to train on cannot be found. Make each "
                    "answer a sample of its own: one assistant message, the last."
                )
            if message.get("weight", 1):
                result += [(full[position : len(head)], False), (full[len(head) : len(upto)], True)]
                position = len(upto)
        return result + ([(full[position:], False)] if full[position:] else [])

    def measure(self, sample: dict[str, Any]) -> tuple[int, int]:
        """Tokens of a sample, and of its part that must not be cut: all images and the start of the first answer."""
        batch = self._batch([sample], None)
        learned = (batch["labels"][0] != IGNORED).nonzero()
        types = batch.get("mm_token_type_ids")
        visual = types[0].nonzero() if types is not None else self.visual_positions(batch["input_ids"][0])
        last_visual = int(visual.max()) + 1 if len(visual) else 0
        return batch["input_ids"].shape[1], max(last_visual, int(learned.min()))

    def prompt_tokens(self, messages: list[dict[str, Any]], images: list[Any]) -> tuple[int, int]:
        """(tokens, visual tokens) of a prompt, as the model reads it before it answers."""
        text = self.render(messages, add_generation_prompt=True)
        encoded = self.processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        ids = encoded["input_ids"][0]
        return len(ids), len(self.visual_positions(ids))

    def visual_positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Where images and videos stand in a row's ids [T]: indices [M, 1]."""
        tokens = [getattr(self.processor, name, None) for name in _VISUAL_IDS]
        return torch.isin(ids, torch.tensor([t for t in tokens if isinstance(t, int)], dtype=ids.dtype)).nonzero()

    @cached_property
    def placeholders(self) -> tuple[str, ...]:
        """The special tokens that stand for pictures and videos in a text."""
        tokenizer, names = self.tokenizer, ("image_token", "video_token", "boi_token", "eoi_token")
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        named = [getattr(owner, name, None) for owner in (self.processor, tokenizer) for name in names]
        ids = [i for name in _VISUAL_IDS if isinstance(i := getattr(self.processor, name, None), int)]
        named += [tokenizer.convert_ids_to_tokens(i) for i in ids]
        around = [token for token in special if "vision" in token or "image" in token or "video" in token]
        return tuple(dict.fromkeys(token for token in (*named, *around) if isinstance(token, str) and token))

    def render(self, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
        """A conversation as the chat template writes it.

        Raises:
            TemplateError: if the template refuses it.
        """
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        options |= {"tools": tools} if tools else {}
        try:
            return self.processor.apply_chat_template(plain, tokenize=False, **options)
        except Exception as error:
            if type(error).__module__.partition(".")[0] != "jinja2":
                raise
            raise TemplateError(f"The processor's chat template refuses this conversation: {error}") from error

    def _mark(self, segments: list[list[tuple[str, bool]]]) -> str:
        """A special token that no prompt contains: it keeps the place of each answer while the processor works.

        Special tokens are cut out before any merging, so that prompt and answer are tokenized each on their own, as
        they are when the model generates.
        """
        prompts = "".join(text for row in segments for text, trained in row if not trained)
        decoder = self.tokenizer.added_tokens_decoder
        plain = [str(t) for t in decoder.values() if t.special and not (t.lstrip or t.rstrip)]
        for token in (self.tokenizer.pad_token, *plain):
            if token in plain and token not in prompts:
                return token
        raise TemplateError("The tokenizer has no special token that could stand in for the answers.")

    def _with_answers(
        self, encoded: dict[str, Any], segments: list[list[tuple[str, bool]]], mark: str, max_length: int | None
    ) -> dict[str, torch.Tensor]:
        """Put the answers' tokens where the marks are, in every token-level output, and make the labels."""
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        mark_id = self.tokenizer.convert_tokens_to_ids(mark)
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else mark_id
        tokenwise = [name for name, value in encoded.items() if getattr(value, "shape", None) == ids.shape]
        fill = {"input_ids": pad_id, "labels": IGNORED}
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in (*tokenwise, "labels")}
        for row, parts in enumerate(segments):
            length = int(mask[row].sum())
            places = (ids[row, :length] == mark_id).nonzero()[:, 0].tolist()
            answers = [
                torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=ids.dtype)
                for text, trained in parts
                if trained
            ]
            assert len(places) == len(answers), "the mark stands for answers only"
            for name in rows:
                source = torch.full_like(ids[row], IGNORED) if name == "labels" else encoded[name][row]
                pieces, start = [], 0
                for place, answer in zip(places, answers, strict=True):
                    said = (
                        answer if name in ("input_ids", "labels") else torch.full_like(answer, name == "attention_mask")
                    )
                    pieces += [source[start:place], said.to(source.dtype)]
                    start = place + 1
                rows[name].append(torch.cat([*pieces, source[start:length]])[:max_length])
        joined = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
            for name, values in rows.items()
        }
        return {**encoded, **joined}


@contextmanager
def may_refuse(processor: Any, what: str) -> Iterator[None]:
    """The block calls a processor, which has many ways to refuse an image or a text: each becomes one error.

    Args:
        processor: that is called.
        what: it reads, for the error's words: the images' sizes, say.

    Raises:
        KeepsightError: naming both, and what the processor says.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise KeepsightError(
            f"This model's processor ({type(processor).__name__}) cannot read {what}: {error}"
        ) from error


def require_chat_template(processor: Any) -> None:
    """Refuse a processor that cannot turn messages into text that its model reads as it should.

    Raises:
        TemplateError: if it has no chat template or no tokenizer, or wants question and answer apart.
    """
    if compat.processor_takes(processor, "suffix"):
        raise TemplateError(
            f"{type(processor).__name__} wants question and answer apart (suffix=), because its model reads the "
            "question in both directions; in a conversation it would see the answers that it learns to give. The "
            "commands are for models that read conversations; attach a memory to this one in a training loop of your "
            "own."
        )
    if getattr(processor, "tokenizer", None) is None:
        raise TemplateError(
            f"{type(processor).__name__} has no tokenizer; a VLM's processor has one beside its images."
        )
    if getattr(processor, "chat_template", None) is None:
        raise TemplateError(
            f"This model's {type(processor).__name__} has no chat template, so there is no telling how it wants to be "
            "asked. Base models often lack one: use the instruction-tuned variant, or put a chat_template.jinja into "
            "the model's folder."
        )
