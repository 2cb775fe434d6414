"""What vLLM's sampler may choose beside latent memories: `MemoryWriter`'s rules, said ahead for a whole request.

Runs inside vLLM, one instance per engine, per request told by `SamplingParams.extra_args["keepsight"]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "keepsight"


class MemoryLimits(AdapterLogitsProcessor):
    """Forbids memory tokens where they cannot be, and keeps penalties off them.

    A request says, under `KEY`:

        never        ids that are never chosen
        while        [id, first, end]: may be a token of this request from number `first` (from 0) to before `end`
        prompt       length of the prompt proper; what follows in this request's prompt is the answer so far
        words        ids below this are text
        repetition, frequency, presence   penalties, as transformers and OpenAI know them
    """

    def is_argmax_invariant(self) -> bool:
        """It changes what is likeliest."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable[..., torch.Tensor] | None:
        """The rules of one request."""
        told: dict[str, Any] | None = (params.extra_args or {}).get(KEY)
        if told is None:
            return None

        def limit(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if told["repetition"] != 1 or told["frequency"] or told["presence"]:
                _penalise(logits, told, prompt_ids, output_ids)
            banned = told["never"] + [
                token for token, first, end in told["while"] if not first <= len(output_ids) < end
            ]
            logits[banned] = -torch.inf
            return logits

        return limit


def _penalise(logits: torch.Tensor, told: dict[str, Any], prompt_ids: list[int], output_ids: list[int]) -> None:
    """Change logits [V] in place: repetition counts the prompt, the other two the answer's text."""
    answer = Counter(i for i in [*prompt_ids[told["prompt"] :], *output_ids] if i < told["words"])
    if told["repetition"] != 1:
        seen = torch.tensor([i for i in {*prompt_ids[: told["prompt"]], *answer} if i < told["words"]])
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * told["repetition"], values / told["repetition"])
    if answer:
        ids = torch.tensor(list(answer))
        counts = torch.tensor(list(answer.values())).to(logits)
        logits[ids] -= told["frequency"] * counts + told["presence"]
