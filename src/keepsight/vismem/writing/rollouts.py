"""Generation for training and experiments: seeds a row, given beginnings, copies of a prompt, and shadows.

A shadow is what a row would have written without its memories. It branches off at the row's first invocation, chooses
its next token from the same logits, and is written in the same batch from then on: no prompt is read again, nothing is
written again, and no step is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MinLengthLogitsProcessor, SuppressTokensLogitsProcessor, TemperatureLogitsWarper

from keepsight.errors import KeepsightError
from keepsight.vismem.sequences import take_rows
from keepsight.vismem.writing.decoding import MemoryDecoder, Step
from keepsight.vismem.writing.output import VisMemOutput
from keepsight.vismem.writing.splicing import Invocations
from keepsight.vismem.writing.writer import MemoryWriter, RowState

#: What a recomputation of log-probabilities from plain logits can do again.
PLAIN = (SuppressTokensLogitsProcessor, TemperatureLogitsWarper)


@dataclass(frozen=True)
class Replay:
    """The beginning of a continuation, to be written again before the model goes on by itself.

    Attributes:
        tokens: ids [n], as in `sequences` after the prompt. If the last is an invocation token, its memory is formed
            anew, under the policy in force; so one can cut a continuation at an invocation and try another memory.
        latents: [m, D], for the memory positions among `tokens`.
    """

    tokens: torch.Tensor
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class RolloutOptions:
    """What `generate(rollout=...)` takes.

    Attributes:
        replay: per row, what to write first.
        seeds: per row, the seed of all that is drawn at random in it, tokens and invocations. The row is then the same
            whatever rows are beside it. Default: torch's own generator draws for all.
        copies: continuations per row of the prompt, which is read once for all of them. (`num_return_sequences` reads
            it once for each.) Per-row settings, the policy's too, count continuations.
        shadows: per row, the seed of a second continuation that branches off where the first memory is invoked and
            goes on without any: what would have been written. It costs no reading of its own, and its row comes after
            all others in the output; see `VisMemOutput.shadowed`. Needs `seeds`.
        plain: refuse every logits processor but temperature and suppressed tokens: the log-probabilities of what is
            written can then be computed again from the model's own logits.
    """

    replay: Sequence[Replay | None] | None = None
    seeds: Sequence[int] | None = None
    copies: int = 1
    shadows: Sequence[int] | None = None
    plain: bool = False

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise KeepsightError(f"copies={self.copies}: expected at least 1.")
        if self.shadows is not None and (self.seeds is None or self.replay is not None):
            raise KeepsightError("shadows: they need `seeds` for the first continuations, and go with no `replay`.")

    def check_rows(self, rows: int) -> None:
        """Raise unless per-row settings fit the number of rows."""
        for name in ("replay", "seeds", "shadows"):
            value = getattr(self, name)
            if value is not None and len(value) != rows:
                raise KeepsightError(
                    f"{name} holds {len(value)} entries for {rows} rows (num_return_sequences counts)."
                )

    def decoder(self, *args: Any) -> MemoryDecoder:
        """The decoder that follows these options."""
        return _RolloutDecoder(self, *args)


class _RolloutDecoder(MemoryDecoder):
    def __init__(
        self,
        options: RolloutOptions,
        writer: MemoryWriter,
        arguments: dict[str, Any],
        history: Invocations | None = None,
    ):
        super().__init__(writer, arguments, history)
        self.options, self.copies = options, options.copies
        self.draws: list[torch.Tensor] | None = None  # per row [room, 3]
        self.shadowed: list[int] = []
        self._shadows: dict[int, int] = dict(enumerate(options.shadows or ()))  # row -> seed, until it branches off

    def start(self) -> None:
        """Read the prompt, once for all copies."""
        options, policy = self.options, self.writer.policy
        if options.plain:
            self._refuse_processors()
        if options.copies > 1 and self.history is not None:
            raise KeepsightError("copies: a prompt with memories is read once for each copy; use num_return_sequences.")
        options.check_rows(len(self.input_ids) * options.copies)
        super().start()
        if options.copies > 1:
            index = torch.arange(len(self.input_ids)).repeat_interleave(options.copies)
            self.input_ids = self.input_ids[index.to(self.input_ids.device)]
            take_rows(index, self.output, self.model_kwargs)
            self.rows = [RowState(self.rows[i].sight, plan=dict(policy.plan(n))) for n, i in enumerate(index.tolist())]
        if options.replay is not None:
            for row, replay in zip(self.rows, options.replay, strict=True):
                if replay is not None:
                    self._replay(row, replay)
        if options.seeds is not None:
            if self.room is None:
                raise KeepsightError("seeds: the length must be bounded; pass max_new_tokens.")
            self.draws = [drawn(seed, self.room) for seed in options.seeds]

    def _refuse_processors(self) -> None:
        others = [type(p).__name__ for p in self.logits_processor if not isinstance(p, PLAIN) and not self._is_idle(p)]
        if others:
            raise KeepsightError(
                f"Rollouts draw from the model's own distribution, whose log-probabilities training computes again; "
                f"{', '.join(others)} would change it. Take its setting out of model.generation_config (or of the "
                "folder's generation_config.json)."
            )

    def _is_idle(self, processor: Any) -> bool:
        """min_new_tokens=0 makes a processor that asks for the length of the prompt, which is always there."""
        return isinstance(processor, MinLengthLogitsProcessor) and processor.min_length <= self.prompt

    def _replay(self, row: RowState, replay: Replay) -> None:
        tokens = self.writer.tokens
        ids = replay.tokens.tolist()
        places = tokens.latent_mask(replay.tokens[None])[0].tolist()
        latents = list(replay.latents) if replay.latents is not None else []
        if len(latents) != sum(places):
            raise KeepsightError(f"replay: {sum(places)} memory positions among the tokens, {len(latents)} latents.")
        asked = tokens.invoked(ids[-1]) if ids else None
        if asked is not None:  # formed anew, under the policy in force, with the token of what is formed
            row.asked, ids[-1] = asked, tokens.invoke[self.writer.policy.formed(asked)]
        row.queue = [(i, latents.pop(0) if place else None) for i, place in zip(ids, places, strict=True)]

    @property
    def _step(self) -> int:
        return self.input_ids.shape[1] - self.prompt

    def choose(self) -> Step:
        """What comes next in every row, and in the shadows that branch off here."""
        if self.draws is not None:
            for row, own in zip(self.rows, self.draws, strict=True):
                row.draws = own[self._step, 1:].tolist()
        step = super().choose()
        branching = [i for i in self._shadows if self.rows[i].waiting is not None]
        return self._branch(step, branching) if branching else step

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """The next token of every row [B], by its own draws if it has any."""
        if self.draws is None or not self.config.do_sample:
            return super().draw(scores)
        return pick(scores.softmax(-1), torch.stack([own[self._step, 0] for own in self.draws]))

    def _branch(self, step: Step, branching: list[int]) -> Step:
        """Shadows of `branching` rows, which choose from the same logits as if there were no memory."""
        assert self.draws is not None
        none = torch.zeros(len(branching), 2, dtype=torch.bool)
        scores = self.scores(step.logits, torch.zeros_like(step.allowed))[branching]
        shadows, room = [], len(self.draws[0])
        for i in branching:
            row = self.rows[i]
            words = row.words  # the invocation is no word: the shadow is as far as its row
            shadows.append(RowState(row.sight, words=words, since=row.since, count=self.writer.limit))
            self.draws.append(drawn(self._shadows.pop(i), room))
        own = self.draws[len(self.rows) :]
        chosen = scores.argmax(-1)
        if self.config.do_sample:
            chosen = pick(scores.softmax(-1), torch.stack([draws[self._step, 0] for draws in own]))
        ids, latents, sampled = self.writer.next(shadows, chosen.tolist(), none, self.pad)
        self.rows, self.shadowed = self.rows + shadows, self.shadowed + branching
        index = torch.tensor([*range(len(step.ids)), *branching])
        on_device = index.to(self.input_ids.device)
        self.input_ids = self.input_ids[on_device]
        take_rows(index, self.output, self.model_kwargs)
        self.record.take(index)
        return Step(
            step.ids + ids,
            step.latents + latents,
            torch.cat([step.sampled, sampled]),
            torch.cat([step.allowed, none]),
            torch.cat([step.scores, scores]),
            step.logits[on_device],
        )

    def _output(self) -> VisMemOutput:
        output = super()._output()
        output.shadowed = self.shadowed
        return output


def drawn(seed: int, room: int) -> torch.Tensor:
    """What a row draws for each position [room, 3]: for a token, an invocation, and its type."""
    return torch.rand(room, 3, generator=torch.Generator().manual_seed(seed))


def pick(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """One sample per row of probabilities [B, V], by uniform random numbers [B]: the first token above the draw."""
    above = probabilities.cumsum(-1)
    total = above[:, -1:]
    # Rounding must neither reach the end nor a token of probability 0.
    target = (draws.to(above)[:, None] * total).minimum(total * (1 - 1e-6))
    return torch.searchsorted(above, target, right=True)[:, 0]
