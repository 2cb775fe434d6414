"""Generation with memory: the decoding loop behind `model.generate(...)`.

transformers' own `generate` does all preparation (inputs, images, caches, logits processors, stopping criteria) and
then calls `MemoryDecoder.run` in place of its sampling loop. What comes next in each row is `MemoryWriter`'s business.
All rows feed equally many positions at each step, so `sequences[b, t]` is always cache slot t, and masks and positions
need no special care; where all rows are inserting (always, for one row) a memory goes in by one call.

Memory positions are positions: they count towards `max_new_tokens`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.compat import cache_argument, find_output_cache
from keepsight.errors import KeepsightError
from keepsight.vismem import scope
from keepsight.vismem.memory import Invocation, read_sights
from keepsight.vismem.writing.checks import refuse_mode
from keepsight.vismem.writing.output import Record, VisMemOutput
from keepsight.vismem.writing.splicing import Invocations, splice
from keepsight.vismem.writing.writer import MemoryWriter, RowState


@dataclass
class Step:
    """What one step has chosen, for B rows and c positions.

    Attributes:
        ids: [B][c].
        latents: [B][c], None where there are none.
        sampled: bool [B, c], where the model chose.
        allowed: bool [B, 2], what it could have invoked.
        scores: [B, V], processed.
        logits: [B, V], the model's own.
    """

    ids: list[list[int]]
    latents: list[list[torch.Tensor | None]]
    sampled: torch.Tensor
    allowed: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor


_NOTHING_LEFT = (
    "The options and processors of this generation (forced_eos_token_id, prefix_allowed_tokens_fn, a grammar, ...) "
    "leave only tokens that memory forbids: its end tokens, and invocation tokens where no memory may come. Let them "
    "allow a word too, or generate with memory='off'."
)


class MemoryDecoder:
    """One call of `generate`.

    Args:
        writer: decides what comes next.
        arguments: what `generate` was given.
        history: the memories of the prompt, per row.
    """

    watch: scope.Watch
    copies = 1  # rows written for each row of the prompt
    has_run = False

    def __init__(self, writer: MemoryWriter, arguments: dict[str, Any], history: Invocations | None = None):
        self.writer, self.arguments, self.history = writer, arguments, history
        self.streamer = arguments.get("streamer")
        self.rows: list[RowState] = []
        self._held_back: dict[int, int] = {}  # row -> how often it asked for a memory that the guard held back

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
        refuse_mode(generation_config)
        self.has_run = True
        self.model, self.input_ids, self.model_kwargs = model, input_ids, model_kwargs
        self.logits_processor, self.stopping_criteria = logits_processor, stopping_criteria
        self.config, self.max_length = generation_config, stopping_criteria.max_length
        pad = generation_config._pad_token_tensor
        self.pad = None if pad is None else int(pad)
        self.prompt, self.record = input_ids.shape[1], Record(generation_config)
        self.start()
        while True:
            step = self.choose()
            self._append(step)
            if all(row.is_done for row in self.rows):
                break
            self._feed(step)
        if self.streamer is not None:
            self.streamer.end()
        return self._output() if generation_config.return_dict_in_generate else self.input_ids

    def start(self) -> None:
        """Read the prompt."""
        copies = self.config.num_return_sequences or 1
        self.writer.policy.check_rows(len(self.input_ids) * self.copies)
        self._read(copies)
        valid = self.model_kwargs.get("attention_mask")
        sights = read_sights(
            self.writer.branch.backbone,
            self.watch.vision_calls,
            self.input_ids,
            self.watch.take_hidden(),
            self.arguments if valid is None else {**self.arguments, "attention_mask": valid[::copies]},
            copies,
            self.writer.embedded(self.watch),
        )
        self.watch.vision_calls.clear()
        policy = self.writer.policy
        self.rows = [RowState(sight, plan=dict(policy.plan(i))) for i, sight in enumerate(sights)]

    def _read(self, copies: int) -> None:
        if self.history is None:
            self.output = self.model._prefill(self.input_ids, self.config, self.model_kwargs)
        else:
            self.history = [row for row in self.history for _ in range(copies)]
            with splice(self.model, self.input_ids, self.history):
                self.output = self.model._prefill(self.input_ids, self.config, self.model_kwargs)
        if find_output_cache(self.output) is None:
            raise KeepsightError(
                f"The model returned no KV cache (looked in its {type(self.output).__name__}), by which what was read "
                "and the memories would be remembered."
            )

    def choose(self) -> Step:
        """What comes next in every row."""
        logits = self.output.logits[:, -1].float()
        self.writer.form(self.rows, self.input_ids.shape[1] - 1)
        allowed = self.writer.allowed(self.rows, [self.room] * len(self.rows))
        self._note_loops(logits)
        scores = self.scores(logits, allowed)
        empty = scores.amax(-1) == -torch.inf
        drawn = self.draw(scores.masked_fill(empty[:, None], 0.0))
        chosen, has_none = torch.stack([drawn, empty.to(drawn.dtype)]).tolist()
        if any(none and not row.queue and not row.is_done for row, none in zip(self.rows, has_none, strict=True)):
            raise KeepsightError(_NOTHING_LEFT)
        ids, latents, sampled = self.writer.next(self.rows, chosen, allowed, self.pad)
        return Step(ids, latents, sampled, allowed, scores, logits)

    @property
    def room(self) -> int | None:
        """How many positions may still be written; None: any number."""
        return None if self.max_length is None else self.max_length - self.input_ids.shape[1]

    def scores(self, logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """Processed logits [B, V]. What is forbidden is so before any filter, and no processor can allow it again."""
        seen = self.input_ids
        if self.history is not None or any(row.count for row in self.rows):
            seen = self.writer.seen(seen, self.prompt)
        return self.writer.constrained(self.logits_processor(seen, self.writer.constrained(logits, allowed)), allowed)

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of every row [B]."""
        return torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.config.do_sample else scores.argmax(-1)

    def _append(self, step: Step) -> None:
        new = torch.tensor(step.ids, device=self.input_ids.device)
        self.record.add(new, step.sampled, step.allowed, step.scores, step.logits)
        self.input_ids = torch.cat([self.input_ids, new], 1)
        if self.streamer is not None:
            for column in new.T:
                if len(self.rows) > 1 or not bool(self.writer.tokens.memory_mask(column).any()):
                    self.streamer.put(column.cpu())
        # A row in the middle of a memory does not stop, unless the sequence is full.
        is_full, stops = self.room is not None and self.room <= 0, self.stopping_criteria(self.input_ids, None)
        for row, stop in zip(self.rows, stops.tolist(), strict=True):
            if is_full or (stop and not row.queue and row.waiting is None):
                row.is_done = True

    def _feed(self, step: Step) -> None:
        count, model = len(step.ids[0]), self.model
        self.model_kwargs = model._update_model_kwargs_for_generation(
            self.output, self.model_kwargs, num_new_tokens=count
        )
        inputs = model.prepare_inputs_for_generation(self.input_ids, next_sequence_length=count, **self.model_kwargs)
        with self.writer.feeding(step.ids, step.latents, self.input_ids.device):
            self.output = model(**inputs, return_dict=True)
        self.writer.remember(self.rows, step.ids, self.watch)

    def _output(self) -> VisMemOutput:
        return VisMemOutput(
            sequences=self.input_ids,
            invocations=self._invocations(),
            sampled=self.record.sampled,
            allowed=self.record.allowed,
            sights=[row.sight for row in self.rows],
            scores=self.record.scores(self.prompt, self.input_ids),
            logits=self.record.logits(self.prompt, self.input_ids),
            shadowed=[],
            **cache_argument(VisMemOutput, find_output_cache(self.output)),
        )

    def _invocations(self) -> list[list[Invocation]]:
        """Per row, the prompt's memories and the new ones."""
        if self.history is None:
            return [row.invocations for row in self.rows]
        found = []
        for i, (earlier, row) in enumerate(zip(self.history, self.rows, strict=True)):
            ids = self.input_ids[i, : self.prompt].tolist()
            places = [place for place, token in enumerate(ids) if self.writer.tokens.invoked(token)]
            own = [dataclasses.replace(o, row=i, position=p) for o, p in zip(earlier, places, strict=False)]
            found.append(own + row.invocations)
        return found

    # What is said after a generation

    def _note_loops(self, logits: torch.Tensor) -> None:
        """Note the rows whose likeliest token is an invocation that the guard against loops holds back."""
        guarded = [
            i
            for i, row in enumerate(self.rows)
            if row.count and not row.queue and not row.is_done and not self.writer.may_follow(row)
        ]
        if not guarded or not self.writer.policy.model_decides:
            return
        for i, token in zip(guarded, logits[guarded].argmax(-1).tolist(), strict=True):
            kind = self.writer.tokens.invoked(token)
            if kind is not None and self.writer.policy.admits(kind):
                self._held_back[i] = self._held_back.get(i, 0) + 1

    def notes(self) -> list[str]:
        """What the caller should be warned of."""
        found = []
        if self._held_back:
            rows = ", ".join(f"row {i} {n} times" for i, n in self._held_back.items())
            found.append(
                f"An invocation loop was cut: the model asked for a memory where none may follow ({rows}). Between two "
                f"memories come at least {self.writer.min_words or 'as many words as a memory has latents'}"
                f"{' words' if self.writer.min_words else ''} (min_words), and an answer holds at most "
                f"{self.writer.limit} (max_invocations)."
            )
        for index, row in enumerate(self.rows):
            if row.plan:
                found.append(
                    f"Forced memories of row {index} were not invoked: {row.plan}. The text ended before, or there was "
                    "no room, no image for a short-term memory, or no invocation left (max_invocations)."
                )
        return found
