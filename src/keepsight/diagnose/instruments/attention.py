"""Measure the visual attention mass of a model while it generates, beside any attention kernel.

At decode step t a head splits its softmax between the visual keys V and the text keys T_t (2605.00814, section 2):

    Z_V = sum over V of exp(s)      Z_T = sum over T_t of exp(s)      Omega_V = Z_V / (Z_V + Z_T)      TVR = Z_T / Z_V

Flash and SDPA kernels never show these sums. The meter takes, at the steps and layers that it was asked for, the query
of the last position and the keys exactly as the layer hands them to its attention function (after norms, rotary
embedding and cache update) and computes the log-sum-exps again; the kernel's own result is passed on untouched (see
`metering.py`). Between measured calls the model is exactly as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.compat import find_cache, find_output_cache
from keepsight.diagnose.instruments.attention_trace import AttentionTrace
from keepsight.diagnose.instruments.layout import VisualLayout, joined
from keepsight.diagnose.instruments.metering import Metered, scores_of
from keepsight.diagnose.instruments.watching import GenerationWatch
from keepsight.errors import KeepsightError, UnsupportedModelError
from keepsight.vismem import scope as vismem_scope

_PARTS = ("visual", "text", "first", "edge", "memory")


class AttentionMeter:
    """Measures the visual attention mass of everything that `model` generates inside the `with` block.

    SDPA and flash attention stay on, no attention matrix is made, and what is stored is five numbers per measured step,
    layer, row and head. Works with batches, left padding, grouped queries, sampling, beams (rows are then beam slots)
    and static caches. Layers with linear attention have no attention mass and are left out.

    Args:
        model: a supported VLM, with or without adapters.
        layers: indices of decoder layers; default: every layer with softmax attention. "auto": up to twelve of them,
            evenly spread over the depth.
        every: measure every n-th generated position.
        where: record also how the mass of row 0 spreads over the visual tokens (M more numbers per measured step).

    Raises:
        UnsupportedModelError: if the model's family is unknown, or none of its layers has softmax attention.
        KeepsightError: if `layers` names a layer that does not exist or has no softmax attention.

    Example:
        >>> with AttentionMeter(model, every=16) as meter:
        ...     model.generate(**inputs, max_new_tokens=8192)
        >>> meter.trace.mass.shape  # [S, L, B, H]
    """

    def __init__(
        self, model: Any, layers: Sequence[int] | Literal["auto"] | None = None, every: int = 1, where: bool = False
    ):
        self.backbone = Backbone.of(model)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise KeepsightError(f"every={every!r}: expected a whole number of steps, 1 or more.")
        self.every, self.where = every, where
        self.layers = _choose_layers(self.backbone, layers)
        self.traces: list[AttentionTrace] = []
        self._watch = GenerationWatch(self.backbone)
        self._metered = Metered([Backbone.mixer(self.backbone.layers[i]) for i in self.layers], self._look)
        self._handles: list[Any] = []
        self._begin()

    @property
    def trace(self) -> AttentionTrace:
        """The last generation.

        Raises:
            KeepsightError: if nothing was generated inside the `with` block.
        """
        if not self.traces:
            raise KeepsightError(
                "The meter has seen no generation. Call model.generate(...) inside `with AttentionMeter(model):`, and "
                "read `trace` after the block."
            )
        return self.traces[-1]

    def __enter__(self) -> AttentionMeter:
        if self._handles:
            raise KeepsightError("This AttentionMeter is already measuring; make a second one for a nested block.")
        decoder = self.backbone.decoder
        self._handles = [
            *self._watch.hooks(),
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, always_call=True, with_kwargs=True),
        ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._metered.off()
        self._finish()

    # -- one generation -------------------------------------------------------------------------------------------
    def _begin(self) -> None:
        self._visual: torch.Tensor | None = None  # bool [B, slots seen]
        self._edge: torch.Tensor | None = None
        self._memory: torch.Tensor | None = None
        self._layouts: list[VisualLayout] = []
        self._slots, self._step = 0, -1
        self._records: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # t -> ([L, 5, B, H], [2, B])
        self._places: dict[int, torch.Tensor] = {}  # t -> [M], summed over layers
        self._now: list[torch.Tensor | None] = []
        self._place: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None

    def _before(self, decoder: Any, args: tuple, kwargs: dict) -> None:
        """Pre-hook of the decoder: which step this is; if it is one to measure, the layers are metered."""
        call = self._watch.call(args, kwargs)
        if call is None:
            return
        start, batch, length = call.start, call.rows, call.length
        if start == 0:
            self._finish()
        none = torch.zeros(batch, length, dtype=torch.bool, device=call.device)
        new = self._watch.take()
        if new is None and start > 0 and length == 1 and self._visual is not None:
            pass  # a decoding step: all later slots are text, which `_look` knows without being told
        else:
            mask, layouts = new if new is not None else (none, [])
            edge = none.clone()
            for row, layout in enumerate(layouts):
                edge[row, torch.as_tensor(layout.slots[layout.edge], device=edge.device)] = True
            self._visual, self._edge = _extended(self._visual, mask, start), _extended(self._edge, edge, start)
            self._layouts = joined(self._layouts, layouts, start, batch)
        splice = vismem_scope.current_splice()
        if splice is not None and splice.mask.shape == (batch, length):
            self._memory = _extended(self._memory, splice.mask.to(call.device), start)
        self._slots, self._step = start + length, call.step
        if self._step % self.every:
            return
        self._now, self._place = [None] * len(self.layers), None
        self._metered.on()

    def _after(self, decoder: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Hook of the decoder, called also when it failed: the layers get their configuration back."""
        if not self._watch.is_here:
            return
        if output is not None and kwargs.get("use_cache"):
            _require_cache(self.backbone, args, kwargs, output)
        if not self._metered.is_on:
            return
        self._metered.off()
        if self._now and all(found is not None for found in self._now) and self._counts is not None:
            device = self._now[0].device  # type: ignore[union-attr]
            stacked = torch.stack([found.to(device) for found in self._now if found is not None])
            self._records[self._step] = stacked, self._counts
            if self._place is not None:
                self._places[self._step] = self._place / len(self.layers)
        elif output is not None:
            unseen = [i for i, found in zip(self.layers, self._now, strict=True) if found is None]
            raise UnsupportedModelError(
                f"The attention of {self.backbone.family.name}'s decoder layers {unseen} did not ask transformers' "
                "attention interface for its function, so the meter sees nothing of them. It cannot measure this model "
                "(compiled graphs included: measure the uncompiled model)."
            )

    @torch.no_grad()
    def _look(self, row: int, query: torch.Tensor, key: torch.Tensor, mask: Any, kwargs: dict) -> None:
        """Record the last query's five log-sum-exps.

        Args:
            row: index into the metered layers.
            query: [B, H, T, d]; key: [B, H_kv, K, d], as the attention function gets them.
            mask: what the attention function gets: bool or additive [B, 1, T, K], padding [B, K], or None.
            kwargs: the attention function's other arguments.
        """
        if not self._watch.is_here:
            return
        assert self._visual is not None
        assert self._edge is not None
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise UnsupportedModelError(
                f"The meter reads attention masks as tensors, and this model's kernel takes a {type(mask).__name__}: "
                "load it with attn_implementation='sdpa' (--attention sdpa)."
            )
        batch, keys = query.shape[0], key.shape[2]
        scores = scores_of(query[:, :, -1:], key, kwargs)[:, :, 0]

        # Slot of every key. A sliding cache has dropped the oldest; a static cache holds room for later ones.
        slots = torch.arange(keys, device=key.device) + max(self._slots - keys, 0)
        open_ = (slots < self._slots)[None].expand(batch, keys)
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            last = mask[:, :, -1, :keys]
            if mask.dtype == torch.bool:
                open_ = open_ & last[:, 0]
            else:
                scores = scores + last.float()
                open_ = open_ & (last[:, 0] > torch.finfo(mask.dtype).min / 2)
        else:
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                open_ = open_ & mask[:, -keys:].bool()
            window = kwargs.get("sliding_window")
            if window:
                open_ = open_ & (slots > self._slots - 1 - window)
        visual, edge = _at(self._visual, slots), _at(self._edge, slots)
        visual, edge = visual.to(key.device) & open_, edge.to(key.device) & open_
        first = torch.zeros_like(visual).scatter(1, open_.int().argmax(1, keepdim=True), True) & open_
        memory = torch.zeros_like(visual) if self._memory is None else _at(self._memory, slots).to(key.device) & open_
        parts = torch.stack([visual, open_ & ~visual, first, edge, memory])  # [5, B, K]
        hidden = scores[None].masked_fill(~parts[:, :, None], float("-inf"))
        self._now[row] = torch.logsumexp(hidden, -1)  # [5, B, H]
        if self.where:
            share = (hidden[0, 0] - torch.logsumexp(hidden[:2, 0], (0, 2))[:, None]).exp().mean(0)  # [K]
            share = share[visual[0]].to(self._visual.device)
            self._place = share if self._place is None else self._place + share
        if row == 0:
            self._counts = torch.stack([parts[1].sum(1), visual.sum(1)])

    def _finish(self) -> None:
        """Turn what was recorded into a trace."""
        if self._records:
            steps = sorted(self._records)
            values = torch.stack([self._records[t][0] for t in steps]).float().cpu().numpy()  # [S, L, 5, B, H]
            counts = torch.stack([self._records[t][1] for t in steps]).cpu().numpy()  # [S, 2, B]
            edges = np.array([int(layout.edge.sum()) for layout in self._layouts], np.int64)
            self.traces.append(
                AttentionTrace(
                    layers=np.array(self.layers, np.int64),
                    steps=np.array(steps, np.int64),
                    text_tokens=counts[:, 0],
                    visual_tokens=counts[-1, 1],
                    edge_tokens=edges if len(edges) else np.zeros(counts.shape[-1], np.int64),
                    layouts=tuple(self._layouts),
                    where=self._stacked_places(steps),
                    **{f"log_{name}": values[:, :, i] for i, name in enumerate(_PARTS)},
                )
            )
        self._begin()

    def _stacked_places(self, steps: list[int]) -> np.ndarray | None:
        found = [self._places.get(t) for t in steps]
        if any(place is None for place in found) or len({len(p) for p in found if p is not None}) != 1:
            return None
        return torch.stack([place for place in found if place is not None]).float().cpu().numpy()


def _require_cache(backbone: Backbone, args: tuple, kwargs: dict, output: Any) -> None:
    """Raises UnsupportedModelError if a call keeps a KV cache that nobody can find: every step would be the first."""
    if find_output_cache(output) is None and find_cache(args, kwargs) is None:
        raise UnsupportedModelError(
            f"{backbone.decoder_path} was called with use_cache=True, and the meter finds no KV cache: looked for an "
            f"instance of transformers' Cache among its arguments ({', '.join(kwargs)}) and in its output "
            f"({type(output).__name__}). It cannot tell which step a call is."
        )


def _choose_layers(backbone: Backbone, layers: Any) -> list[int]:
    able = [i for i, layer in enumerate(backbone.layers) if Backbone.has_softmax_attention(layer)]
    if not able:
        raise UnsupportedModelError(
            f"None of this {backbone.family.name}'s {len(backbone.layers)} decoder layers has softmax attention, so "
            "there is no attention mass to measure: expected one at least."
        )
    if layers is None:
        return able
    if isinstance(layers, str):
        if layers != "auto":
            raise KeepsightError(f"layers={layers!r}: expected 'auto' or indices such as [8, 16, 24].")
        return [able[i] for i in np.unique(np.linspace(0, len(able) - 1, min(12, len(able))).round().astype(int))]
    chosen = list(dict.fromkeys(int(i) for i in layers))
    outside = [i for i in chosen if not 0 <= i < len(backbone.layers)]
    if not chosen or outside:
        raise KeepsightError(f"layers={chosen}: expected some of 0 to {len(backbone.layers) - 1}.")
    linear = [i for i in chosen if i not in able]
    if linear:
        raise KeepsightError(
            f"layers={chosen}: {linear} have linear attention, which keeps a state and attends to no token, so there "
            f"is no attention mass to measure. Layers with softmax attention: {able}."
        )
    return chosen


def _extended(known: torch.Tensor | None, new: torch.Tensor, start: int) -> torch.Tensor:
    """The mask [B, start] of earlier slots (cut or filled with text to that length) with `new` [B, T] behind it."""
    if known is None or start == 0:
        known = new.new_zeros(new.shape[0], 0)
    slots = torch.arange(start, device=known.device)
    return torch.cat([_at(known, slots).to(new.device), new], 1)


def _at(mask: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The mask [B, known] at `slots` [K]; false beyond what is known."""
    if mask.shape[1] == 0:
        return torch.zeros(mask.shape[0], len(slots), dtype=torch.bool, device=mask.device)
    slots = slots.to(mask.device)
    return mask[:, slots.clamp(max=mask.shape[1] - 1)] & (slots < mask.shape[1])
