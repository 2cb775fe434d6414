"""VisMem in a batch whose rows come and go: the decoder of `model.generate`, asked row by row.

`MemoryDecoder` decides for rows that began together and share one length. Here every row has a length and a limit of
its own, so whatever depends on them is asked for one row at a time; forming, inserting and splicing are its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.serve.errors import ApiError
from keepsight.serve.hf.rows import Invocation, Row
from keepsight.vismem import scope
from keepsight.vismem.decoding import MemoryDecoder, _Row
from keepsight.vismem.memory import Sight
from keepsight.vismem.policy import MemoryPolicy
from keepsight.vismem.tokens import MemoryTokens
from keepsight.vismem.tuner import BRANCH
from keepsight.vismem.vision import Patches


class LatentMemories(MemoryDecoder):
    """The latent memories of the rows of one batch. Each row keeps its own state in `Row.latent`."""

    @classmethod
    def of(cls, model: Any) -> LatentMemories | None:
        """For a model, if it carries a VisMem that its own policy does not switch off."""
        branch = getattr(Backbone.of(model).decoder, BRANCH, None)
        if branch is None or branch.active is None:
            return None
        policy = MemoryPolicy.of(None, branch.config)
        return None if policy.name == "off" else cls(branch, policy, MemoryTokens(branch.config.token_ids), {})

    def fresh(self) -> LatentMemories:
        """The same for another batch."""
        return LatentMemories(self.branch, self.policy, self.tokens, {})

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While the model is called: notes what memories are formed from."""
        with scope.watching() as watch:
            self.watch = watch
            try:
                yield
            finally:
                self.watch = None

    def start(self, inputs: dict[str, torch.Tensor], input_ids: torch.Tensor) -> Any:
        """The state of one row [1, T] whose prompt has just been read."""
        self.arguments = inputs
        (state,) = self._start(input_ids, 1)
        self.arguments = {}  # pixels are not kept
        return state

    def blank(self, has_image: bool) -> Any:
        """The state of a row whose prompt has not been read yet; what it sees is filled in when a memory needs it."""
        patches = Patches(torch.empty(0, 0), (), (), None, (0, 0)) if has_image else None
        return _Row(Sight(torch.empty(0, 0), patches), plan=dict(self.policy.plan(0)))

    @staticmethod
    def copy(state: Any) -> Any:
        """The same for another answer to the same prompt, which shares what was seen."""
        return replace(state, queue=[], text=[], invocations=[], plan={})

    def is_memory(self, token: int) -> bool:
        """Whether an id stands for memory and not for text."""
        return token in self.tokens.ids

    def form(self, rows: list[Row]) -> None:
        """Form the memories of all rows that have just been fed an invocation. A row whose memory fails gets the error;
        the others are not touched."""
        waiting = [row for row in rows if row.latent.waiting is not None]
        if not waiting:
            return
        before = {id(row): len(row.latent.invocations) for row in waiting}
        try:
            self._form_waiting([row.latent for row in waiting], 0)
        except Exception:
            for row in waiting:
                if row.latent.waiting is None:
                    continue
                try:
                    self._form_waiting([row.latent], 0)
                except Exception as error:
                    row.error = ApiError(500, f"A memory could not be formed ({type(error).__name__}).")
        for row in waiting:
            for found in row.latent.invocations[before[id(row)] :]:
                row.invocations.append(
                    Invocation(
                        found.kind, found.invoked_as, row.text.length, len(found.latents), bool(found.was_sampled)
                    )
                )
            row.latent.invocations.clear()  # latents and states are not kept beyond the cache

    def allowed(self, row: Row) -> torch.Tensor:
        """Bool [1, 2]: whether the row may invoke each type now."""
        return self._allowed([row.latent], len(row.ids), row.job.prompt_tokens + row.job.sampling.max_tokens)

    @staticmethod
    def is_inserting(row: Row) -> bool:
        """Whether the row's next positions are those of a memory that goes in, so that nothing is chosen."""
        return bool(row.latent.queue)

    def constrained(self, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] without what cannot be chosen: end tokens, and invocations that are not allowed."""
        return self._constrained(logits, allowed)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [1, T] as logits processors see them: memory is no text."""
        return self._hidden(ids, None)

    def next(self, rows: list[Row], chosen: list[int]) -> tuple[list[list[int]], list[list[Any]]]:
        """The next positions of all rows, equally many: ids, and latents where there are any."""
        allowed = []
        for row in rows:
            allowed.append(self.allowed(row))
            draws = self.policy.name == "random" and not self.is_inserting(row)
            row.latent.draws = torch.rand(1, 3, generator=row.generator) if draws else None
        ids, latents, _ = self._next([row.latent for row in rows], chosen, torch.cat(allowed), None, 0)
        return ids, latents

    def feeding(self, ids: list[list[int]], latents: list[list[Any]]) -> contextlib.AbstractContextManager[Any]:
        """The scope of the model call that is given these positions."""
        return self._given(ids, latents, self.branch.weight.device)

    def remember(self, rows: list[Row], ids: list[list[int]], latents: list[list[Any]]) -> None:
        """Collect the text states of what has just been fed. Call it inside `watching`."""
        self._remember([row.latent for row in rows], ids, latents)
