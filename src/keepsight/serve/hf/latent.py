"""VisMem in a batch whose rows come and go.

`MemoryWriter` decides for any rows; here every row has a length and a limit of its own, and its state in `Row.latent`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from keepsight.serve.errors import ApiError
from keepsight.serve.hf.rows import InvocationRecord, Row
from keepsight.vismem import MemoryPolicy, VisMemBranch, scope
from keepsight.vismem.memory import Sight, read_sights
from keepsight.vismem.vision import Patches
from keepsight.vismem.writing.writer import MemoryWriter, RowState


class LatentMemories:
    """The latent memories of the rows of one batch.

    Args:
        writer: decides what comes next in a row.
    """

    def __init__(self, writer: MemoryWriter):
        self.writer, self.tokens, self.policy = writer, writer.tokens, writer.policy

    @classmethod
    def of(cls, model: Any, policy: MemoryPolicy | None = None) -> LatentMemories | None:
        """For a model, if it carries a VisMem that its own policy (or the given one) does not switch off."""
        branch = VisMemBranch.find(model)
        if branch is None or branch.active is None:
            return None
        policy = MemoryPolicy.of(policy, branch.config)
        return None if policy.name == "off" else cls(MemoryWriter(branch, policy))

    def start(self, inputs: dict[str, torch.Tensor], input_ids: torch.Tensor, watch: scope.Watch) -> RowState:
        """The state of one row [1, T] whose prompt has just been read, under `watch`."""
        calls, hidden = watch.vision_calls, watch.take_hidden()
        embedded = self.writer.embedded(watch)
        (sight,) = read_sights(self.writer.branch.backbone, calls, input_ids, hidden, inputs, embedded=embedded)
        calls.clear()
        return RowState(sight, plan=dict(self.policy.plan(0)))

    def blank(self, has_image: bool) -> RowState:
        """The state of a row whose prompt has not been read yet; what it sees is filled in when a memory needs it."""
        patches = Patches(torch.empty(0, 0), (), (), None, (0, 0)) if has_image else None
        return RowState(Sight(torch.empty(0, 0), patches), plan=dict(self.policy.plan(0)))

    @staticmethod
    def copy(state: RowState) -> RowState:
        """The same for another answer to the same prompt, which shares what was seen."""
        return replace(state, queue=[], text=[], tokens=[], invocations=[], plan={})

    def form(self, rows: list[Row]) -> None:
        """Form the memories of all rows that have just been fed an invocation. A row whose memory fails gets the error;
        the others are not touched."""
        waiting = [row for row in rows if row.latent.waiting is not None]
        if not waiting:
            return
        before = {id(row): len(row.latent.invocations) for row in waiting}
        try:
            self.writer.form([row.latent for row in waiting])
        except Exception:
            for row in waiting:
                if row.latent.waiting is None:
                    continue
                try:
                    self.writer.form([row.latent])
                except Exception as error:
                    row.error = ApiError(500, f"A memory could not be formed ({type(error).__name__}).")
        for row in waiting:
            for found in row.latent.invocations[before[id(row)] :]:
                row.invocations.append(
                    InvocationRecord(
                        found.kind, found.invoked_as, row.text.length, len(found.latents), bool(found.was_sampled)
                    )
                )
            row.latent.invocations.clear()  # latents and states are not kept beyond the cache

    def allowed(self, rows: list[Row]) -> torch.Tensor:
        """Bool [B, 2]: whether each row may invoke each type now."""
        rooms = [row.job.prompt_tokens + row.job.sampling.max_tokens - len(row.ids) for row in rows]
        return self.writer.allowed([row.latent for row in rows], rooms)

    def constrained(self, rows: list[Row], logits: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] without what cannot be chosen: end tokens, and invocations that are not allowed."""
        return self.writer.constrained(logits, self.allowed(rows))

    def seen(self, row: Row, ids: torch.Tensor) -> torch.Tensor:
        """A row's ids [1, T] as logits processors see them: memory is no text."""
        return self.writer.seen(ids, row.job.prompt_tokens) if row.latent.count else ids

    def next(self, rows: list[Row], chosen: list[int]) -> tuple[list[list[int]], list[list[Any]]]:
        """The next positions of all rows, equally many: ids, and latents where there are any."""
        for row in rows:
            draws = self.policy.name == "random" and not row.latent.queue
            row.latent.draws = torch.rand(2, generator=row.generator).tolist() if draws else None
        ids, latents, _ = self.writer.next([row.latent for row in rows], chosen, self.allowed(rows))
        return ids, latents
