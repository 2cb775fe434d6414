"""How one row's next token is chosen: transformers' own logits processors, then a draw from the row's own generator."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, SequenceBiasLogitsProcessor


@dataclass(frozen=True)
class Sampling:
    """What a request says about choosing tokens. None: as the model's own generation config says.

    Attributes:
        max_tokens: positions to write at most; memories count.
        temperature: 0 takes the likeliest token.
        top_p: nucleus.
        top_k: the likeliest so many; 0: all.
        min_p: those at least so likely, measured by the likeliest.
        repetition_penalty: divides the logits of what was said (transformers'; the prompt counts, memories do not).
        frequency_penalty: subtracted per earlier occurrence in the answer.
        presence_penalty: subtracted if the token occurs in the answer.
        logit_bias: token id -> what is added to its logit.
        seed: makes sampling repeatable; answer i of a request draws with seed + i.
        logprobs: None, or how many of the likeliest tokens to report beside the chosen one.
        stop: texts that end an answer.
    """

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()

    def options(self, config: GenerationConfig) -> dict[str, Any]:
        """Arguments for `generate`, which makes the logits processors from them.

        Args:
            config: the model's generation config, for what the request leaves open.
        """
        temperature = self.temperature
        if temperature is None:
            temperature = float(config.temperature or 1.0) if config.do_sample else 0.0
        options: dict[str, Any] = {"max_new_tokens": self.max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            options["temperature"] = temperature
            filters = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
            options |= {name: value for name, value in filters.items() if value is not None}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        return options

    def processors(self, prompt: int) -> list[LogitsProcessor]:
        """What OpenAI's API has and transformers has not. They come before temperature and filters.

        Args:
            prompt: length of the prompt, which no penalty counts.
        """
        found: list[LogitsProcessor] = []
        if self.logit_bias:
            found.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in self.logit_bias.items()}))
        if self.frequency_penalty or self.presence_penalty:
            found.append(Penalties(self.frequency_penalty, self.presence_penalty, prompt))
        return found


def end_ids(config: GenerationConfig) -> frozenset[int]:
    """Token ids that end an answer."""
    found = config.eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


class Penalties(LogitsProcessor):
    """OpenAI's penalties: logit - count * frequency - (count > 0) * presence, over the answer so far.

    Args:
        frequency: per occurrence.
        presence: once.
        prompt: length of the prompt.
    """

    def __init__(self, frequency: float, presence: float, prompt: int):
        self.frequency, self.presence, self.prompt = frequency, presence, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [1, V]."""
        counts = Counter(input_ids[0, self.prompt :].tolist())
        if not counts:
            return scores
        ids = torch.tensor(list(counts), device=scores.device)
        minus = [-self.frequency * count - self.presence for count in counts.values()]
        return scores.index_add(1, ids, torch.tensor(minus).to(scores)[None])  # type: ignore[return-value]


NO_TOKEN = "The model computes NaN, or every token is forbidden."


def likeliest(scores: torch.Tensor) -> list[int | None]:
    """The likeliest token of each row of processed scores [B, V]; None where they hold NaN or forbid every token."""
    best = scores.max(-1)
    return [
        None if math.isnan(value) or value == -math.inf else token
        for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def draw(scores: torch.Tensor, generator: torch.Generator) -> int:
    """A token drawn from processed scores [1, V].

    Raises:
        FloatingPointError: if they hold NaN, or forbid every token.
    """
    probabilities = scores[0].float().softmax(-1).cpu()
    if not bool(probabilities.isfinite().all()):
        raise FloatingPointError(NO_TOKEN)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def log_probs(logits: torch.Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Of the model's own distribution, before temperature and penalties.

    Args:
        logits: of one row [V].
        token: the chosen id.
        top: how many of the likeliest to name.

    Returns:
        (log-probability of the chosen token, [(id, log-probability) of the likeliest]).
    """
    values = logits.float().log_softmax(-1)
    best = values.topk(top) if top else None
    likeliest = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(values[token]), likeliest
