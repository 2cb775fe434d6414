"""What generation with memory returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keepsight.compat import GenerationOutput
from keepsight.vismem.memory import Invocation, Sight


@dataclass
class VisMemOutput(GenerationOutput):
    """What `generate(..., return_dict_in_generate=True)` returns: transformers' own output, and what memory adds.

    The KV cache stands under the name that the installed transformers gives it. `attentions` and `hidden_states` are
    not collected and stay None.

    Attributes:
        sequences: ids [B, T]; a memory stands there as `<invoke> <end> ... <end>` (see `tokens.py`).
        invocations: per row, its memories in order: type, position, latents, and what they were formed from. Those of
            the prompt (`generate(invocations=...)`) come first: give the next turn of a conversation all of them.
        sampled: bool [B, new], true where the model chose the token: not memory, not forced, not padding.
        allowed: bool [B, new, 2], whether the row could have invoked a short / a long memory there.
        sights: per row, what the prompt showed: visual states and patches.
        scores: with `output_scores`: per new position, processed logits [B, V]; where nothing was chosen, the token
            that stands there has 0 and all others -inf.
        logits: with `output_logits`: likewise, unprocessed.
        shadowed: of the rows after the first B, which row each is the shadow of (`RolloutOptions.shadows`).
    """

    invocations: list[list[Invocation]] | None = None
    sampled: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    sights: list[Sight] | None = None
    shadowed: list[int] | None = None


class Record:
    """What the output object tells about every new position."""

    def __init__(self, generation_config: Any):
        wanted = generation_config.return_dict_in_generate
        self._keep = {
            "scores": bool(wanted and generation_config.output_scores),
            "logits": bool(wanted and generation_config.output_logits),
        }
        self._sampled: list[torch.Tensor] = []
        self._allowed: list[torch.Tensor] = []
        self._values: dict[str, list[torch.Tensor]] = {"scores": [], "logits": []}

    def add(
        self,
        new: torch.Tensor,
        sampled: torch.Tensor,
        allowed: torch.Tensor,
        scores: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """One step: ids [B, c], of which the first was chosen where `sampled` [B, c] says so."""
        more = new.shape[1] - 1
        self._sampled.append(sampled)
        self._allowed.append(torch.cat([allowed[:, None], allowed.new_zeros(len(allowed), more, 2)], 1))
        for name, value in (("scores", scores), ("logits", logits)):
            if self._keep[name]:
                self._values[name] += [value] + [torch.full_like(value, -torch.inf)] * more

    def take(self, index: torch.Tensor) -> None:
        """The rows are now those of `index`."""
        self._sampled = [value[index] for value in self._sampled]
        self._allowed = [value[index] for value in self._allowed]
        self._values = {name: [v[index.to(v.device)] for v in values] for name, values in self._values.items()}

    @property
    def sampled(self) -> torch.Tensor:
        """Bool [B, new]."""
        return torch.cat(self._sampled, 1)

    @property
    def allowed(self) -> torch.Tensor:
        """Bool [B, new, 2]."""
        return torch.cat(self._allowed, 1)

    def scores(self, prompt: int, sequences: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Processed logits per new position, if they were asked for."""
        return self._filled("scores", prompt, sequences)

    def logits(self, prompt: int, sequences: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Unprocessed logits per new position, if they were asked for."""
        return self._filled("logits", prompt, sequences) if self._keep["logits"] else None

    def _filled(self, name: str, prompt: int, sequences: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        if not self._keep[name]:
            return None
        sampled, result = self.sampled, []
        for step, value in enumerate(self._values[name]):
            forced = ~sampled[:, step].to(value.device)
            if name == "scores" and bool(forced.any()):
                certain = torch.full_like(value, -torch.inf).scatter_(1, sequences[:, prompt + step, None], 0.0)
                value = torch.where(forced[:, None], certain, value)
            result.append(value)
        return tuple(result)
