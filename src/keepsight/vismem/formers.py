"""The two memory formers: the base model, run on what was seen and thought, under a low-rank adapter.

    short   vision encoder:   [patches | to_vision(Q) | M_init]  -> last positions -> the model's own projector
    long    language model:   [H | Q | M_init]                   -> last positions   (long_input="tokens": the input
                              embeddings of everything so far in place of H)

The queries Q come from the query builder. Nothing is kept between two memories of an image: a form that kept keys and
values was slower on a GPU (LOG.md, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError
from keepsight.vismem import layout
from keepsight.vismem.memory import Formation, Sight
from keepsight.vismem.module import LatentMemory, match_rms
from keepsight.vismem.scope import BANK, base_only, calls, low_rank
from keepsight.vismem.sequences import pad
from keepsight.vismem.tokens import SHORT
from keepsight.vismem.vision import Rotary, VisionWalk


class Formers:
    """Forms memories of one adapter on one model. Cheap to make; holds references only.

    Args:
        backbone: the model's parts.
        memory: the adapter's parameters.
        config: its resolved `VisMemConfig`.
    """

    def __init__(self, backbone: Backbone, memory: LatentMemory, config: Any):
        self.backbone, self.memory, self.config = backbone, memory, config

    def length(self, kind: str) -> int:
        """N of one type of memory."""
        return self.config.num_short if kind == SHORT else self.config.num_long

    def form(self, kind: str, formations: Sequence[Formation]) -> torch.Tensor:
        """Form one memory per formation.

        Args:
            kind: "short" or "long".
            formations: what each is formed from.

        Returns:
            [B, N, D], the latents as input embeddings, in the memory's dtype.
        """
        with base_only():
            text, text_valid = self._texts(formations)
            queries = self._queries(formations, text, text_valid)
            formed = (
                self._short(formations, queries)
                if kind == SHORT
                else self._long(formations, text, text_valid, queries)
                if self.config.long_input == "states"
                else self._long_of_tokens(formations, queries)
            )
        latents = self.memory.as_embeddings(formed.to(self.memory.dtype), kind == SHORT)
        change = calls.here.change
        return latents if change is None else change(kind, latents)

    def _texts(self, formations: Sequence[Formation]) -> tuple[torch.Tensor, torch.Tensor]:
        limit = self.config.max_text_states
        return pad([f.text if limit is None else f.text[-limit:] for f in formations])

    # Query builder

    def _queries(self, formations: Sequence[Formation], text: torch.Tensor, text_valid: torch.Tensor) -> torch.Tensor:
        visual, visual_valid = pad([f.sight.visual for f in formations])
        return self.memory.builder(visual, visual_valid, text, text_valid)

    # Short-term: vision encoder

    def _short(self, formations: Sequence[Formation], queries: torch.Tensor) -> torch.Tensor:
        walk = self._walk()
        formed = [self._short_row(walk, f.sight, q) for f, q in zip(formations, queries, strict=True)]
        return torch.stack(formed)

    def _walk(self) -> VisionWalk:
        return VisionWalk(self.backbone, self.memory.short_bank)

    def _short_row(self, walk: VisionWalk, sight: Sight, queries: torch.Tensor) -> torch.Tensor:
        patches, count = sight.patches, self.config.num_queries
        assert patches is not None, "a row without an image has no short-term memory"
        slots = self.memory.short_slots
        side = self.backbone.merge_side
        own = torch.cat([self.memory.to_vision(queries), slots]).to(patches.x.dtype)
        place = layout.grid if self.config.slot_layout == "grid" else layout.strip
        squares = place(self.config.num_short, side, patches.extent).flatten(0, 1)
        table = self.backbone.position_table()
        if table is not None and self.config.slot_layout == "grid":
            learned = layout.learned_positions(table.detach(), squares, patches.extent).to(own)
            own = torch.cat([own[:count], own[count:] + learned])
        rotary = self._rotary(torch.cat([layout.query_coordinates(count, patches.extent), squares]), own)
        states = walk.through(patches, own, rotary)
        return self.backbone.project_vision(states[count:].unflatten(0, (-1, side * side)))

    def _rotary(self, coordinates: torch.Tensor, like: torch.Tensor) -> Rotary | None:
        name = self.backbone.vision.rotary
        if name is None:
            return None
        return self.backbone.vision_tower.get_submodule(name)(like, coordinates.to(like.device))

    # Long-term: language model

    def _long(
        self,
        formations: Sequence[Formation],
        text: torch.Tensor,
        text_valid: torch.Tensor,
        queries: torch.Tensor,
    ) -> torch.Tensor:
        rows = zip(formations, text, text_valid, strict=True)
        seen, valid = pad([torch.cat([f.sight.visual, t[v]]) for f, t, v in rows])
        return self._behind(self._as_input(seen), valid, queries)

    def _long_of_tokens(self, formations: Sequence[Formation], queries: torch.Tensor) -> torch.Tensor:
        """The same with the token sequence as X: input embeddings, which are not rescaled."""
        limit, sequences = self.config.max_text_states, []
        for formation in formations:
            prompt, tokens = formation.sight.prompt, formation.tokens
            if prompt is None or tokens is None:
                raise KeepsightError(
                    "long_input='tokens' forms a long-term memory from the language model's input embeddings, and they "
                    "were not kept here. Use model.generate, keepsight serve or keepsight train; or "
                    "long_input='states'."
                )
            sequences.append(torch.cat([prompt, tokens if limit is None else tokens[-limit:]]))
        seen, valid = pad(sequences)
        return self._behind(seen.to(self._dtype), valid, queries)

    def _behind(self, x: torch.Tensor, valid: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The last [B, N, D] of the language model on [X | Q | M_init], for inputs X [B, L, D] `valid` at [B, L]."""
        slots = self.memory.long_slots.expand(len(x), -1, -1)
        own = torch.cat([self._as_input(queries), slots.to(self._dtype)], 1)
        valid = torch.cat([valid, valid.new_ones(own.shape[:2])], 1)
        return self._decode(torch.cat([x, own], 1), valid)[:, -self.config.num_long :]

    @property
    def _dtype(self) -> torch.dtype:
        return self.backbone.model.get_input_embeddings().weight.dtype

    def _as_input(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, D] with the norm of input embeddings: the two differ by orders of magnitude."""
        return match_rms(states, self.memory.embedding_rms).to(self._dtype)

    def _decode(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The decoder's last hidden states [B, L, D] of inputs x that are `valid` [B, L]."""
        added = int(self.backbone.needs_padding)
        if added:
            x, valid = F.pad(x, (0, 0, 1, 0)), F.pad(valid, (1, 0))
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
        bank = self.memory.long_bank
        with low_rank(bank):
            output = self.backbone.decoder(
                inputs_embeds=x,
                attention_mask=valid.long(),
                position_ids=positions,
                use_cache=False,
                **{BANK: bank},
            )
        return output.last_hidden_state[:, added:]
