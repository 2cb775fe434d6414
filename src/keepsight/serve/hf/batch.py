"""Continuous batching: answers that are written together, and join and leave between any two tokens.

transformers' own `generate` reads every prompt (preparation of inputs, images, cache, logits processors), one request
at a time, and hands over to `Batch` where its sampling loop would begin (`custom_generate`). From there all rows share
one cache (`cache.py`) and one forward per step. What is per request stays per row: processors, generator, stop texts,
lengths, latent memory.

transformers has a continuous batching of its own. It cannot serve here: it takes no images (its server falls back to
one request at a time for every VLM), and it packs all requests into one row, where no memory can tell them apart.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from transformers import LogitsProcessorList

from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, find_output_cache
from keepsight.peft_method import memory_off
from keepsight.serve.errors import explain
from keepsight.serve.hf import cache as shared
from keepsight.serve.hf.choosing import next_tokens
from keepsight.serve.hf.latent import LatentMemories
from keepsight.serve.hf.rows import Job, Row
from keepsight.serve.hf.sampling import end_ids, log_probs
from keepsight.vismem import scope


class Batch:
    """Rows that are written together.

    Args:
        model: as `keepsight.load` returns it.
        tokenizer: a copy of the processor's own, for this thread alone.
        memory: whether memories are on for these rows.
    """

    def __init__(self, model: Any, tokenizer: Any, memory: bool):
        self.model, self.tokenizer, self.memory = model, tokenizer, memory
        self.base = Backbone.of(model).model
        self.latent = LatentMemories.of(model) if memory else None
        self.rows: list[Row] = []
        self.cache: Any = None
        self.logits: torch.Tensor | None = None  # [B, V], from which the next tokens are chosen
        self.constant: dict[str, Any] = {}  # what else the model's forward is given
        self._lost: list[Row] = []  # rows that failed in a forward

    def _empty(self) -> Batch:
        other = copy.copy(self)
        other.rows, other.cache, other.logits, other._lost = [], None, None, []
        return other

    @property
    def length(self) -> int:
        """T: slots of the cache, which are those of its longest row."""
        return max((len(row.ids) for row in self.rows), default=0)

    @property
    def can_share(self) -> bool:
        """Whether rows can join."""
        return self.cache is None or shared.can_share(self.cache)

    def _memories(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.memory else memory_off(self.model)

    def _watching(self) -> contextlib.AbstractContextManager[scope.Watch | None]:
        """While the model is called: notes what memories are formed from."""
        return contextlib.nullcontext() if self.latent is None else scope.watching()

    # Reading prompts

    @torch.no_grad()
    def read(self, job: Job) -> Batch:
        """Read a prompt: a batch of this request's rows alone, ready to choose their first tokens."""
        alone = self._empty()
        options = job.sampling.options(self.base.generation_config)
        inputs = {name: value.to(self.base.device) for name, value in job.inputs.items()}
        plain = type(self.base).generate
        with self._memories(), self._watching() as watch:
            plain(
                self.base,
                **inputs,
                **options,
                logits_processor=LogitsProcessorList(job.sampling.processors(inputs["input_ids"].shape[1])),
                num_beams=1,
                num_return_sequences=1,
                use_cache=True,
                cache_implementation="dynamic",
                custom_generate=functools.partial(alone._take, job, inputs, watch),
            )
        return alone

    def _take(
        self,
        job: Job,
        inputs: dict[str, torch.Tensor],
        watch: scope.Watch | None,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """What `generate` calls in place of its loop."""
        output = model._prefill(input_ids, generation_config, model_kwargs)
        self.cache = find_output_cache(output)
        self.constant = {name: model_kwargs[name] for name in ("logits_to_keep",) if name in model_kwargs}
        positions = model_kwargs.get("position_ids")  # [B, T], or [P, B, T] with P rotary dimensions
        if positions is not None:
            positions = positions[..., 0, -1].to("cpu", copy=True)
        latent = None if self.latent is None or watch is None else self.latent.start(inputs, input_ids, watch)
        for index in range(job.choices):
            self.rows.append(
                Row(
                    job=job,
                    index=index,
                    ids=input_ids[0].tolist(),
                    tokenizer=self.tokenizer,
                    do_sample=bool(generation_config.do_sample),
                    ends=end_ids(generation_config),
                    position=positions,
                    processors=logits_processor,
                    latent=None if latent is None else LatentMemories.copy(latent),
                )
            )
        self.logits = output.logits[:, -1].to(torch.float32, copy=True)
        if job.choices > 1:
            self.logits = self.logits.repeat(job.choices, 1)
            shared.keep(self.cache, [0] * job.choices, 0)
        return input_ids

    # Joining and leaving

    def can_take(self, other: Batch) -> bool:
        """Whether the rows of another batch can be written together with these."""
        same = self.model is other.model and self.memory == other.memory
        return same and self.can_share and other.can_share

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch."""
        if not other.rows:
            return
        if not self.rows:
            self.rows, self.cache, self.logits = other.rows, other.cache, other.logits
            self.constant = other.constant
            return
        assert self.logits is not None
        assert other.logits is not None
        shared.join(self.cache, (self.length, other.length), other.cache)
        self.logits = torch.cat([self.logits, other.logits])
        self.rows += other.rows

    def leave(self, rows: list[int]) -> None:
        """Keep these rows only; what the others held is freed."""
        if len(rows) == len(self.rows):
            return
        before = self.length
        self.rows = [self.rows[i] for i in rows]
        if not self.rows:
            self.cache = self.logits = None
            return
        assert self.logits is not None
        self.logits = self.logits[torch.tensor(rows, device=self.logits.device)]
        shared.keep(self.cache, rows, before - self.length)

    # One step

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Choose every row's next tokens and feed them; rows that are over leave.

        Returns:
            The rows that left: finished, failed, or cancelled.
        """
        gone = self._sweep()
        if not self.rows:
            return gone
        with self._memories():
            ids, latents = self._choose()
            living = [i for i, row in enumerate(self.rows) if not row.is_over]
            gone += self._sweep()
            if self.rows:
                self._feed([ids[i] for i in living], [latents[i] for i in living])
                gone += self._sweep()
        return gone

    def _sweep(self) -> list[Row]:
        """Let the rows leave that are over."""
        over = [row for row in self.rows if row.is_over]
        gone, self._lost = self._lost + over, []
        if over:
            self.leave([i for i, row in enumerate(self.rows) if not row.is_over])
        return gone

    def _choose(self) -> tuple[list[list[int]], list[list[Any]]]:
        """The next positions of every row, equally many for all: ids and latents [B][c]. Sends their text."""
        assert self.logits is not None
        if self.latent is not None:
            self.latent.form(self.rows)
        chosen = next_tokens(self.rows, self.logits, self.latent)
        if self.latent is None:
            ids: list[list[int]] = [[token] for token in chosen]
            latents: list[list[Any]] = [[None] for _ in chosen]
        else:
            ids, latents = self.latent.next(self.rows, chosen)
        for i, row in enumerate(self.rows):
            if row.error is None:
                try:
                    self._write(row, ids[i], self.logits[i])
                except Exception as error:
                    row.error = explain(error)
        return ids, latents

    def _write(self, row: Row, ids: list[int], logits: torch.Tensor) -> None:
        """Send the text of new positions, and find out whether the answer is over."""

        def entry(token: int) -> Any:
            assert row.job.sampling.logprobs is not None
            return token, *log_probs(logits, token, row.job.sampling.logprobs)

        row.write(ids, () if self.latent is None else self.latent.tokens.ids, entry)

    def _feed(self, ids: list[list[int]], latents: list[list[Any]]) -> None:
        """One forward of the new positions [B][c]. If it fails it is tried again in halves, down to single rows; what
        fails alone gets the error, and nobody else does."""
        before = self.length
        try:
            self._forward(ids, latents)
        except Exception as error:
            if len(self.rows) == 1 or not shared.can_rewind(self.cache):
                for row in self.rows:
                    row.error = explain(error)
                return
            shared.rewind(self.cache, before)
            middle = len(self.rows) // 2
            both = range(middle), range(middle, len(self.rows))
            halves = [self._part(list(rows)) for rows in both]
            self.rows, self.cache, self.logits = [], None, None
            for half, rows in zip(halves, both, strict=True):
                half._feed([ids[i] for i in rows], [latents[i] for i in rows])
                self._lost += half._sweep()
                self.join(half)

    def _forward(self, ids: list[list[int]], latents: list[list[Any]]) -> None:
        count, before = len(ids[0]), self.length
        device = self.base.device
        lengths = [len(row.ids) for row in self.rows]
        mask = None
        if min(lengths) < before:
            gaps = torch.tensor([[before - length] for length in lengths], device=device)
            mask = (torch.arange(before + count, device=device) >= gaps).long()
        newest = [row.position for row in self.rows if row.position is not None]
        positions = None
        if newest:  # [(P,) B, c]
            positions = (torch.stack(newest, -1)[..., None] + torch.arange(1, count + 1)).to(device)
        feeding: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.latent is not None:
            writer = self.latent.writer
            feeding = writer.feeding(ids, latents, writer.branch.weight.device)
        with self._watching() as watch, feeding:
            output = self.base(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **cache_argument(self.base, self.cache),
                **self.constant,
            )
            if self.latent is not None and watch is not None:
                self.latent.writer.remember([row.latent for row in self.rows], ids, watch)
        self.logits = output.logits[:, -1].to(torch.float32, copy=True)
        for row, new in zip(self.rows, ids, strict=True):
            row.ids += new
            if row.position is not None:
                row.position = row.position + count

    def _part(self, rows: list[int]) -> Batch:
        """Some rows as a batch of their own; this one keeps its cache."""
        part = self._empty()
        part.rows = [self.rows[i] for i in rows]
        part.cache = shared.copied(self.cache)
        shared.keep(part.cache, rows, self.length - part.length)
        assert self.logits is not None
        part.logits = self.logits[torch.tensor(rows, device=self.logits.device)]
        return part
