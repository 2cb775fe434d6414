"""Generation with memory: the decoding loop behind `model.generate(...)`.

transformers' own `generate` does all preparation (inputs, images, caches, logits processors, stopping criteria) and
then calls `MemoryDecoder.run` in place of its sampling loop. Each row has a queue of inputs that must come next: a
formed memory's latents, then its end token. At each step all living rows feed the same number of positions: the
shortest queue, or one if any row chooses its next token freely. So `sequences[b, t]` is always cache slot t, and masks
and positions need no special care; where all rows are inserting (always, for one row) a memory goes in by one call.

Memory positions count towards `max_new_tokens`.
"""

from __future__ import annotations

import contextlib
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from keepsight.compat import cache_argument, find_output_cache
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.vismem import scope
from keepsight.vismem.branching import take_rows
from keepsight.vismem.checks import refuse, warn, with_stop_strings
from keepsight.vismem.formers import Formers
from keepsight.vismem.memory import Formation, Invocation, Sight, read_sights, splice_values
from keepsight.vismem.output import Record, VisMemOutput
from keepsight.vismem.policy import MemoryPolicy, drawn
from keepsight.vismem.tokens import LONG, SHORT, TYPES, MemoryTokens, id_tensor
from keepsight.vismem.tuner import VisMemBranch


def generate(branch: Any, *args: Any, memory: MemoryPolicy | str | None = None, **kwargs: Any) -> Any:
    """`generate` of a model that carries VisMem.

    Args:
        branch: the model's `VisMemBranch`.
        args: as for transformers' `generate`.
        memory: when memory is invoked: a `MemoryPolicy`, or its name. Default: the config's policy.
        kwargs: as for transformers' `generate`.

    Returns:
        As transformers' `generate`; with `return_dict_in_generate=True`, a `VisMemOutput`.

    Raises:
        KeepsightError: before any work, for what cannot be combined with memory.
    """
    model = branch.backbone.model
    plain = type(model).generate
    if branch.active is None:
        if memory is not None:
            warnings.warn(
                f"memory={memory!r} has no effect: no VisMem adapter is active.", KeepsightWarning, stacklevel=3
            )
        return plain(model, *args, **kwargs)
    policy = MemoryPolicy.of(memory, branch.config)
    if policy.name == "off":
        with scope.silent():
            return plain(model, *args, **kwargs)
    refuse(model, args, kwargs)
    warn(branch, policy)
    if policy.name == "random" and not branch.config.delimiter_ids:
        raise KeepsightError(
            "Policy 'random' invokes after delimiters, whose tokens are unknown: call "
            "add_memory_tokens(processor, model)."
        )
    tokens = MemoryTokens(branch.config.token_ids)
    kwargs = with_stop_strings(model, kwargs, tokens)
    decoder = MemoryDecoder(branch, policy, tokens, kwargs)
    with scope.watching() as watch:
        decoder.watch = watch
        return plain(model, *args, custom_generate=decoder.run, **kwargs)


def splice(
    model: Any, sequences: torch.Tensor, invocations: list[list[Invocation]] | torch.Tensor
) -> AbstractContextManager[Any]:
    """Give whole sequences their memories: for one uncached forward, as in training.

    Example:
        >>> with splice(model, out.sequences, out.invocations):
        ...     logits = model(input_ids=out.sequences, attention_mask=mask, **pixels).logits

    Args:
        model: a model that carries VisMem.
        sequences: ids [B, T], as `generate` returned them.
        invocations: the output's; or latents [n, D] in their order, for memories formed anew with gradients.
    """
    branch = VisMemBranch.of(model)
    mask = MemoryTokens(branch.config.token_ids or []).latent_mask(sequences)
    if not torch.is_tensor(invocations):
        invocations = splice_values(sequences, invocations, branch.backbone.text_config.hidden_size)
    if len(invocations) != int(mask.sum()):
        raise KeepsightError(f"{int(mask.sum())} memory positions in the sequences, {len(invocations)} latents.")
    return scope.spliced(mask, invocations)


@dataclass
class _Row:
    """One row while it is written."""

    sight: Sight
    queue: list[tuple[int, torch.Tensor | None]] = field(default_factory=list)  # (id, latent) that must come next
    text: list[torch.Tensor] = field(default_factory=list)  # hidden states [n, D] since the last memory
    words: int = 0  # text tokens written
    after_delimiter: bool = False
    waiting: str | None = None  # invocation token fed, memory not yet formed
    was_sampled: bool = False
    invocations: list[Invocation] = field(default_factory=list)
    count: int = 0  # invocations, replayed ones included
    is_done: bool = False
    plan: dict[int, str] = field(default_factory=dict)
    draws: torch.Tensor | None = None  # [room, 3], see `MemoryPolicy.draws`
    shadow: int | None = None  # seed of a shadow that has not branched off yet
    is_shadow: bool = False


class MemoryDecoder:
    """One call of `generate`.

    Args:
        branch: the model's `VisMemBranch`.
        policy: when memory is invoked.
        tokens: which ids are memory.
        arguments: what `generate` was given.
    """

    def __init__(self, branch: Any, policy: MemoryPolicy, tokens: MemoryTokens, arguments: dict[str, Any]):
        self.branch, self.policy, self.tokens, self.arguments = branch, policy, tokens, arguments
        self.formers: Formers = branch.formers()
        self.streamer = arguments.get("streamer")
        limit = policy.max_invocations
        self.limit = branch.config.max_invocations if limit is None else limit
        self.watch: Any = None

    @torch.no_grad()
    def run(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """The loop; called by transformers' `generate` in place of its own."""
        copies = generation_config.num_return_sequences or 1
        self.policy.check_rows(len(input_ids) * self.policy.copies)
        max_length = stopping_criteria.max_length
        pad = generation_config._pad_token_tensor
        record = Record(generation_config)

        output = model._prefill(input_ids, generation_config, model_kwargs)
        rows = self._start(input_ids, copies)
        if self.policy.copies > 1:
            index = torch.arange(len(input_ids)).repeat_interleave(self.policy.copies)
            input_ids = input_ids[index.to(input_ids.device)]
            take_rows(index, output, model_kwargs)
        prompt = input_ids.shape[1]
        shadowed: list[int] = []
        draws = self.policy.draws(None if max_length is None else max_length - prompt)
        for place, row in enumerate(rows):
            row.draws = None if draws is None else draws[place]
        while True:
            step = input_ids.shape[1] - prompt
            logits = output.logits[:, -1].float()
            self._form_waiting(rows, input_ids.shape[1])
            allowed = self._allowed(rows, input_ids.shape[1], max_length)
            seen = self._hidden(input_ids, pad) if any(row.count for row in rows) else input_ids
            processed = logits_processor(seen, logits.clone())
            scores = self._constrained(processed, allowed)
            chosen = _chosen(scores, rows, step, generation_config.do_sample)
            ids, latents, sampled = self._next(rows, chosen.tolist(), allowed, pad, step)
            branching = [i for i, row in enumerate(rows) if row.shadow is not None and row.waiting is not None]
            if branching:
                index = torch.tensor([*range(len(rows)), *branching])
                on_device = index.to(input_ids.device)
                shadows = self._shadows(rows, branching, draws)
                without = self._constrained(processed[branching], torch.zeros(len(branching), 2, dtype=torch.bool))
                scores, logits = torch.cat([scores, without]), logits[on_device]
                allowed = torch.cat([allowed, torch.zeros(len(branching), 2, dtype=torch.bool)])
                own = _chosen(without, shadows, step, generation_config.do_sample)
                more, none, own_sampled = self._next(shadows, own.tolist(), allowed[-len(branching) :], pad, step)
                ids, latents, sampled = ids + more, latents + none, torch.cat([sampled, own_sampled])
                rows, shadowed = rows + shadows, shadowed + branching
                input_ids = input_ids[on_device]
                take_rows(index, output, model_kwargs)
                record.take(index)
            new = torch.tensor(ids, device=input_ids.device)
            record.add(new, sampled, allowed, scores, logits)
            input_ids = torch.cat([input_ids, new], 1)
            self._stream(new, rows)
            self._stop(rows, stopping_criteria(input_ids, None), max_length, input_ids.shape[1])
            if all(row.is_done for row in rows):
                break
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs, num_new_tokens=new.shape[1])
            inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new.shape[1], **model_kwargs)
            with self._given(ids, latents, new.device):
                output = model(**inputs, return_dict=True)
            self._remember(rows, ids, latents)
        if self.streamer is not None:
            self.streamer.end()
        self._warn_missed(rows)
        if not generation_config.return_dict_in_generate:
            return input_ids
        return VisMemOutput(
            sequences=input_ids,
            invocations=[row.invocations for row in rows],
            sampled=record.sampled,
            allowed=record.allowed,
            sights=[row.sight for row in rows],
            scores=record.scores(prompt, input_ids),
            logits=record.logits(prompt, input_ids),
            shadowed=shadowed,
            **cache_argument(VisMemOutput, find_output_cache(output)),
        )

    def _shadows(self, rows: list[_Row], branching: list[int], draws: torch.Tensor | None) -> list[_Row]:
        """Rows that go on from where `branching` rows invoke their first memory, and invoke none."""
        assert draws is not None
        found = []
        for index in branching:
            row, room = rows[index], draws.shape[1]
            assert row.shadow is not None
            own = _Row(row.sight, words=row.words, count=self.limit, draws=drawn(row.shadow, room), is_shadow=True)
            row.shadow = None
            found.append(own)
        return found

    def _start(self, input_ids: torch.Tensor, copies: int) -> list[_Row]:
        sights = read_sights(
            self.branch.backbone, self.watch.vision_calls, input_ids, self.watch.hidden, self.arguments, copies
        )
        self.watch.vision_calls.clear()
        rows = [_Row(sight) for sight in sights for _ in range(self.policy.copies)]
        for index, row in enumerate(rows):
            row.plan = dict(self.policy.plan(index))
            row.shadow = None if self.policy.shadows is None else self.policy.shadows[index]
            replay = self.policy.replay[index] if self.policy.replay is not None else None
            if replay is not None:
                row.queue = self._replayed(replay)
        return rows

    def _replayed(self, replay: Any) -> list[tuple[int, torch.Tensor | None]]:
        ids = replay.tokens.tolist()
        places = self.tokens.latent_mask(replay.tokens[None])[0].tolist()
        latents = list(replay.latents) if replay.latents is not None else []
        if len(latents) != sum(places):
            raise KeepsightError(f"replay: {sum(places)} memory positions among the tokens, {len(latents)} latents.")
        return [(i, latents.pop(0) if place else None) for i, place in zip(ids, places, strict=True)]

    def _form_waiting(self, rows: list[_Row], length: int) -> None:
        """Form the memories of all rows that have just fed an invocation token, one call per type."""
        for kind in TYPES:
            ready = [i for i, row in enumerate(rows) if row.waiting == kind and not row.is_done]
            if not ready:
                continue
            formed = self.policy.formed(kind)
            formations = [Formation(rows[i].sight, torch.cat(rows[i].text)) for i in ready]
            memories = self.formers.form(formed, formations)
            for i, formation, latents in zip(ready, formations, memories, strict=True):
                row, end = rows[i], self.tokens.end[formed]
                latents = latents.to(formation.text.dtype)
                row.queue = [(end, latent) for latent in latents] + [(end, None)]
                row.invocations.append(Invocation(i, formed, kind, length - 1, row.was_sampled, latents, formation))
                row.waiting, row.text = None, []

    def _allowed(self, rows: list[_Row], length: int, max_length: int | None) -> torch.Tensor:
        """Bool [B, 2]: whether a row may invoke each type now."""
        return torch.tensor(
            [
                [not row.queue and not row.is_done and self._can(row, kind, length, max_length) for kind in TYPES]
                for row in rows
            ]
        )

    def _can(self, row: _Row, kind: str, length: int, max_length: int | None) -> bool:
        formed = self.policy.formed(kind)
        if row.count >= self.limit or (formed == SHORT and row.sight.patches is None):
            return False
        # The invocation token, the whole memory, the end token, and at least one word after it.
        return max_length is None or length + 1 + self.formers.length(formed) + 1 < max_length

    def _constrained(self, scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """End tokens are never chosen, invocation tokens only where allowed."""
        free = allowed & torch.tensor([self.policy.admits(kind) for kind in TYPES])
        invokes = [self.tokens.invoke[kind] for kind in TYPES]
        kept = [scores[:, token].clone() if free[:, i].any() else None for i, token in enumerate(invokes)]
        scores = scores.index_fill(1, id_tensor(tuple(self.tokens.ids), scores.device), -torch.inf)
        for column, (token, before) in enumerate(zip(invokes, kept, strict=True)):
            if before is not None:
                scores[:, token] = before.masked_fill(~free[:, column].to(scores.device), -torch.inf)
        return scores

    def _hidden(self, input_ids: torch.Tensor, pad: Any) -> torch.Tensor:
        """The ids that logits processors see: memory is no text, so that nothing penalises its repetition."""
        filler = 0 if pad is None else int(pad)
        return input_ids.masked_fill(self.tokens.memory_mask(input_ids), filler)

    def _given(self, ids: list[list[int]], latents: list[list[Any]], device: torch.device) -> Any:
        """The scope in which the next positions are fed: with their latents, or with nothing to look for."""
        values = [v for row in latents for v in row if v is not None]
        if values:
            mask = torch.tensor([[v is not None for v in row] for row in latents], device=device)
            return scope.spliced(mask, torch.stack(values))
        if any(i in self.tokens.ids for row in ids for i in row):
            return contextlib.nullcontext()
        return scope.only_words()

    def _next(
        self, rows: list[_Row], chosen: list[int], allowed: torch.Tensor, pad: Any, step: int
    ) -> tuple[list[list[int]], list[list[torch.Tensor | None]], torch.Tensor]:
        """The next positions of all rows: ids [B, c], their latents, and where the model chose: bool [B, c]."""
        living = [row for row in rows if not row.is_done]
        length = min(len(row.queue) or 1 for row in living)
        ids, latents, sampled = [], [], []
        for index, row in enumerate(rows):
            own: list[tuple[int, torch.Tensor | None]]
            was_sampled = False
            if row.is_done:
                own = [(chosen[index] if pad is None else int(pad), None)] * length
            elif row.queue:
                own, row.queue = row.queue[:length], row.queue[length:]
                row.count += sum(i in self.tokens.invoke.values() for i, _ in own)
                last = own[-1][0]
                if not row.queue and last in self.tokens.invoke.values():  # a replay that ends at an invocation
                    row.waiting, row.was_sampled = self._kind(last), False
                row.words += sum(i not in self.tokens.ids for i, _ in own)
            else:
                kind = self._inserted(row, allowed[index], step)
                was_sampled = kind is None
                token = chosen[index] if kind is None else self.tokens.invoke[kind]
                own = [(token, None)]
                if token in self.tokens.invoke.values():
                    row.waiting, row.was_sampled = self._kind(token), was_sampled
                    row.count += 1
                    row.after_delimiter = False
                else:
                    row.words += 1
                    row.after_delimiter = token in (self.branch.config.delimiter_ids or ())
            ids.append([i for i, _ in own])
            latents.append([latent for _, latent in own])
            sampled.append([was_sampled] + [False] * (length - 1))
        return ids, latents, torch.tensor(sampled)

    def _kind(self, token: int) -> str:
        return SHORT if token == self.tokens.invoke[SHORT] else LONG

    def _inserted(self, row: _Row, allowed: torch.Tensor, step: int) -> str | None:
        """The type that the policy, not the model, invokes now."""
        can = {kind for kind, ok in zip(TYPES, allowed.tolist(), strict=True) if ok}
        if self.policy.name == "forced":
            kind = row.plan.get(row.words)
            if kind in can:
                del row.plan[row.words]
                return kind
        is_place = row.after_delimiter or (self.policy.places == "anywhere" and bool(row.text))  # no memory on memory
        if self.policy.name == "random" and is_place and can:
            probability = self.policy.probability
            if probability is None:
                probability = self.branch.config.random_probability
            row.after_delimiter = False
            whether, which = (torch.rand(2) if row.draws is None else row.draws[step, 1:]).tolist()
            if whether < probability:
                return sorted(can)[int(which * len(can))]
        return None

    def _stream(self, new: torch.Tensor, rows: list[_Row]) -> None:
        if self.streamer is None:
            return
        for column in new.T:
            if len(rows) > 1 or not bool(self.tokens.memory_mask(column).any()):
                self.streamer.put(column.cpu())

    def _stop(self, rows: list[_Row], stops: Any, max_length: int | None, length: int) -> None:
        """A row in the middle of a memory does not stop, unless the sequence is full."""
        full = max_length is not None and length >= max_length
        for row, stop in zip(rows, stops.tolist(), strict=True):
            if full or (stop and not row.queue and row.waiting is None):
                row.is_done = True

    def _remember(self, rows: list[_Row], ids: list[list[int]], latents: list[list[Any]]) -> None:
        """Collect the text states of what was just fed; memory positions and end tokens are no text."""
        hidden, limit = self.watch.hidden, self.branch.config.max_text_states
        ends = self.tokens.end.values()
        for row, states, tokens, values in zip(rows, hidden, ids, latents, strict=True):
            if row.is_done or row.is_shadow:
                continue
            # An end token closes the memory before it, latents and all: H restarts there.
            last = max((i for i, token in enumerate(tokens) if token in ends), default=-1)
            if last >= 0:
                row.text = []
            text = [i > last for i in range(len(values))]
            if all(text):
                row.text.append(states)
            elif any(text):
                row.text.append(states[torch.tensor(text, device=states.device)])
            if limit is not None and len(row.text) > limit:
                row.text = row.text[-limit:]

    def _warn_missed(self, rows: list[_Row]) -> None:
        for index, row in enumerate(rows):
            if row.plan:
                warnings.warn(
                    f"Forced memories of row {index} were not invoked: {row.plan}. The text ended before, or there was "
                    "no room, no image for a short-term memory, or no invocation left (max_invocations).",
                    KeepsightWarning,
                    stacklevel=2,
                )


def _chosen(scores: torch.Tensor, rows: list[_Row], step: int, do_sample: bool) -> torch.Tensor:
    """The next token of every row [B], by its own draws if it has any."""
    if not do_sample:
        return scores.argmax(-1)
    if rows[0].draws is None:
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]
    return pick(scores.softmax(-1), torch.stack([row.draws[step, 0] for row in rows if row.draws is not None]))


def pick(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """One sample per row of probabilities [B, V], by uniform random numbers [B]: the first token above the draw."""
    above = probabilities.cumsum(-1)
    total = above[:, -1:]
    # Rounding must neither reach the end nor a token of probability 0.
    target = (draws.to(above)[:, None] * total).minimum(total * (1 - 1e-6))
    return torch.searchsorted(above, target, right=True)[:, 0]
