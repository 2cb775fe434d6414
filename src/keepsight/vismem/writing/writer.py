"""Writing with memory, row by row: which tokens may come, what is inserted, and what memories are formed from.

Three loops write with memory: `generate` (decoding.py), the server's batches, and vLLM's. Each holds a `MemoryWriter`
and asks it the same five things in every step:

    form        the memories of rows that have just been fed an invocation token
    allowed     whether each row may invoke now; and `constrained`, the logits without what cannot be chosen
    next        every row's next positions: what was chosen, or what comes in its place
    feeding     the scope of the model call that is given these positions
    remember    what memories will be formed from, of what has just been fed

Each row has a queue of inputs that must come next: a formed memory's latents, then its end token. At each step all
living rows feed the same number of positions: the shortest queue, or one if any row chooses its next token freely.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from keepsight.vismem import scope
from keepsight.vismem.branch import VisMemBranch
from keepsight.vismem.memory import Formation, Invocation, Sight
from keepsight.vismem.sequences import text_last
from keepsight.vismem.tokens import SHORT, TYPES
from keepsight.vismem.writing.policy import MemoryPolicy


@dataclass
class RowState:
    """One row while it is written.

    Attributes:
        sight: what it sees.
        plan: forced places that are still to come.
        queue: (id, latent or None) that must come next.
        text: hidden states [n, D] since the last memory.
        tokens: input embeddings [n, D] since the prompt, where memories are formed from them.
        words: text tokens written.
        since: of them, since the last memory.
        size: positions of the last memory after its invocation token.
        count: invocations, replayed ones included.
        after_delimiter: the newest word is a delimiter.
        waiting: the type of memory whose invocation token was fed, not yet formed.
        asked: the type that was asked for; differs from `waiting` under policy "reversed".
        was_sampled: the model asked for it itself.
        draws: policy "random": two uniform numbers, for an invocation and its type; None: torch's own generator draws.
        invocations: the memories formed, in order.
        is_done: nothing more is written.
    """

    sight: Sight
    plan: dict[int, str] = field(default_factory=dict)
    queue: list[tuple[int, torch.Tensor | None]] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    words: int = 0
    since: int = 0
    size: int = 0
    count: int = 0
    after_delimiter: bool = False
    waiting: str | None = None
    asked: str | None = None
    was_sampled: bool = False
    draws: Sequence[float] | None = None
    invocations: list[Invocation] = field(default_factory=list)
    is_done: bool = False


class MemoryWriter:
    """Decides for rows that are written with one memory under one policy. Holds no row itself.

    Args:
        branch: the model's `VisMemBranch`, with an active adapter.
        policy: when memory is invoked.
    """

    def __init__(self, branch: VisMemBranch, policy: MemoryPolicy):
        self.branch, self.policy, self.tokens = branch, policy, branch.tokens
        self.formers = branch.formers()
        config = branch.config
        self.limit = config.max_invocations if policy.max_invocations is None else policy.max_invocations
        self.min_words = config.min_words if policy.min_words is None else policy.min_words

    def form(self, rows: Sequence[RowState], position: int = 0) -> None:
        """Form the memories of all rows that have just fed an invocation token, one call per type.

        Args:
            rows: B rows.
            position: of the invocation tokens, for the records.
        """
        for kind in TYPES:
            ready = [i for i, row in enumerate(rows) if row.waiting == kind and not row.is_done]
            if not ready:
                continue
            formations = [
                Formation(row.sight, torch.cat(row.text), torch.cat(row.tokens) if row.tokens else None)
                for row in (rows[i] for i in ready)
            ]
            memories = self.formers.form(kind, formations)
            end = self.tokens.end[kind]
            for i, formation, latents in zip(ready, formations, memories, strict=True):
                row = rows[i]
                latents = latents.to(formation.text.dtype)
                row.queue = [(end, latent) for latent in latents] + [(end, None)]
                asked = row.asked or kind
                row.invocations.append(Invocation(i, kind, asked, position, row.was_sampled, latents, formation))
                row.waiting, row.asked, row.text = None, None, []

    def may_follow(self, row: RowState, since: int | None = None) -> bool:
        """The guard against invocation loops: whether another memory may come, as far as the earlier ones go.

        Args:
            row: a row.
            since: words since its last memory, if not the row's own.
        """
        if row.count >= self.limit:
            return False
        if not self.policy.model_decides or not row.count:
            return True
        wanted = self.min_words if self.min_words is not None else row.size - 1
        return (row.since if since is None else since) >= wanted

    def has_room(self, row: RowState, kind: str, room: int | None) -> bool:
        """Whether the memory that is formed for `kind` can be formed, and fits with at least one word after it.

        Args:
            row: a row.
            kind: the type that is asked for.
            room: how many positions may still be written; None: any number.
        """
        formed = self.policy.formed(kind)
        if formed == SHORT and row.sight.patches is None:
            return False
        return room is None or self.formers.length(formed) + 2 < room

    def allowed(self, rows: Sequence[RowState], rooms: Sequence[int | None]) -> torch.Tensor:
        """Bool [B, 2], on the CPU: whether each row may invoke each type now.

        Args:
            rows: B rows.
            rooms: how many positions each may still write.
        """
        return torch.tensor(
            [
                [
                    not row.queue and not row.is_done and self.may_follow(row) and self.has_room(row, kind, room)
                    for kind in TYPES
                ]
                for row, room in zip(rows, rooms, strict=True)
            ]
        )

    def constrained(self, scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] without what cannot be chosen: end tokens, and invocation tokens that are not allowed.

        To be applied to the model's own logits, before anything that filters by rank or share (top-k, top-p): a filter
        that kept only what is forbidden afterwards would leave nothing.
        """
        scores = scores.clone()
        for token in self.tokens.end.values():  # one by one: a list would be copied to the device every time
            scores[:, token] = -torch.inf
        for column, kind in enumerate(TYPES):
            token, free = self.tokens.invoke[kind], allowed[:, column] & self.policy.admits(kind)
            if not free.any():
                scores[:, token] = -torch.inf
            elif not free.all():
                scores[:, token] = scores[:, token].masked_fill(~free.to(scores.device), -torch.inf)
        return scores

    def seen(self, ids: torch.Tensor, prompt: int) -> torch.Tensor:
        """The ids [B, T] that logits processors see: the text without its memories, in one piece, after the prompt.

        What is left over carries an end token, which is never chosen, so that it does not matter what a processor does
        to it. (A padding token would matter where it also ends the text.)

        Args:
            ids: of whole sequences.
            prompt: length of the prompt.
        """
        is_memory, filler = self.tokens.memory_mask(ids), self.tokens.end[SHORT]
        before = ids[:, :prompt].masked_fill(is_memory[:, :prompt], filler)
        return torch.cat([before, text_last(ids[:, prompt:], is_memory[:, prompt:], filler)], 1)

    def next(
        self, rows: Sequence[RowState], chosen: list[int], allowed: torch.Tensor, pad: int | None = None
    ) -> tuple[list[list[int]], list[list[torch.Tensor | None]], torch.Tensor]:
        """The next positions of all rows, equally many.

        Args:
            rows: B rows.
            chosen: a token for each, which counts where nothing must come.
            allowed: bool [B, 2].
            pad: what rows that are done are filled up with.

        Returns:
            Ids [B][c]; their latents [B][c], None where there are none; where the model chose: bool [B, c].
        """
        length = min((len(row.queue) or 1 for row in rows if not row.is_done), default=1)
        ids, latents, sampled = [], [], []
        for index, row in enumerate(rows):
            was_sampled = False
            if row.is_done:
                own: list[tuple[int, torch.Tensor | None]] = [(chosen[index] if pad is None else pad, None)] * length
            elif row.queue:
                own, row.queue = row.queue[:length], row.queue[length:]
                for token, _ in own:
                    self._count(row, token)
                if not row.queue and self.tokens.invoked(own[-1][0]):  # a replay that ends at an invocation
                    row.waiting, row.was_sampled = self.tokens.invoked(own[-1][0]), False
            else:
                inserted = self._inserted(row, allowed[index])
                asked = self.tokens.invoked(chosen[index]) if inserted is None else inserted
                token = chosen[index] if asked is None else self.tokens.invoke[self.policy.formed(asked)]
                was_sampled = inserted is None and token == chosen[index]  # "reversed" writes another one
                own = [(token, None)]
                self._count(row, token)
                if asked is not None:
                    row.waiting, row.asked, row.was_sampled = self.policy.formed(asked), asked, inserted is None
            ids.append([i for i, _ in own])
            latents.append([latent for _, latent in own])
            sampled.append([was_sampled] + [False] * (length - 1))
        return ids, latents, torch.tensor(sampled)

    def feeding(
        self, ids: list[list[int]], latents: list[list[Any]], device: torch.device
    ) -> AbstractContextManager[Any]:
        """The scope of the model call that is given these positions: with their latents, or nothing to look for."""
        values = [v for row in latents for v in row if v is not None]
        if values:
            mask = torch.tensor([[v is not None for v in row] for row in latents], device=device)
            return scope.spliced(mask, torch.stack(values))
        if any(i in self.tokens.ids for row in ids for i in row):
            return contextlib.nullcontext()
        return scope.only_words()

    def remember(self, rows: Sequence[RowState], ids: list[list[int]], watch: scope.Watch) -> None:
        """Collect the text states of what was just fed; memory positions and end tokens are no text.

        Args:
            rows: B rows.
            ids: fed [B][c]; where there were latents, their memory's end token.
            watch: what passed by: the decoder's last hidden states [B, c, D], and what it was given.
        """
        hidden, embedded = watch.take_hidden(), self.embedded(watch)
        limit, ends = self.branch.config.max_text_states, self.tokens.end.values()
        for index, (row, states, tokens) in enumerate(zip(rows, hidden, ids, strict=True)):
            if row.is_done or (row.count >= self.limit and row.waiting is None):  # nothing will be formed from it
                continue
            if embedded is not None:
                row.tokens.append(embedded[index])
                if limit is not None:
                    row.tokens = row.tokens[-limit:]
            # An end token closes the memory before it, latents and all: H restarts there.
            last = max((i for i, token in enumerate(tokens) if token in ends), default=-1)
            if last >= 0:
                row.text = []
            if last + 1 < len(tokens):
                row.text.append(states[last + 1 :])
            if limit is not None and len(row.text) > limit:
                row.text = row.text[-limit:]

    def embedded(self, watch: scope.Watch) -> torch.Tensor | None:
        """What the decoder was given, where memories are formed from it."""
        return watch.embedded if self.branch.config.long_input == "tokens" else None

    def _count(self, row: RowState, token: int) -> None:
        """One more position is written."""
        if self.tokens.invoked(token):
            row.count, row.since, row.size = row.count + 1, 0, 0
        elif token in self.tokens.ids:
            row.since, row.size = 0, row.size + 1
        else:
            row.words, row.since = row.words + 1, row.since + 1
        row.after_delimiter = token in (self.branch.config.delimiter_ids or ())

    def _inserted(self, row: RowState, allowed: torch.Tensor) -> str | None:
        """The type that the policy, not the model, invokes now."""
        can = {kind for kind, ok in zip(TYPES, allowed.tolist(), strict=True) if ok}
        if self.policy.name == "forced":
            kind = row.plan.get(row.words)
            if kind in can:
                del row.plan[row.words]
                return kind
        anywhere = self.policy.places == "anywhere" and (row.since > 0 or not row.count)  # no memory on memory
        is_place = row.after_delimiter or anywhere
        if self.policy.name == "random" and is_place and can:
            given = self.policy.probability
            probability = self.branch.config.random_probability if given is None else given
            row.after_delimiter = False
            whether, which = torch.rand(2).tolist() if row.draws is None else row.draws
            if whether < probability:
                return sorted(can)[int(which * len(can))]
        return None
