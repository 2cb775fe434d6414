"""Cross-attention weights of each PVM layer over the visual tokens, for each generated token.

A PVM block's softmax runs over the visual tokens alone, so its weights are the retrieval. They are computed again from
the block's own query and keys, at the last position of every measured call, while the model generates normally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.diagnose.instruments.layout import VisualLayout
from keepsight.diagnose.instruments.watching import GenerationWatch
from keepsight.errors import KeepsightError
from keepsight.pvm.branch import PvmBranch


@dataclass(frozen=True)
class RetrievalTrace:
    """What one generation retrieved (row 0 of the batch).

    Attributes:
        layers: [L] int64, decoder layers with a PVM block.
        steps: [S] int64, tokens generated before each measurement.
        weights: [S, L, M] float32, mean over heads; every [s, l] sums to 1.
        update: [S, L] float32, size of the update relative to the residual stream that it is added to.
        layout: where the M visual tokens lie.
    """

    layers: np.ndarray
    steps: np.ndarray
    weights: np.ndarray
    update: np.ndarray
    layout: VisualLayout

    def maps(self) -> list[np.ndarray]:
        """One heat map per image or video: [S, L, frames, height, width] (see `VisualLayout.maps`)."""
        return self.layout.maps(self.weights)


class RetrievalMeter:
    """Records what the PVM blocks of a model retrieve inside the `with` block, for the first row of the batch.

    Args:
        model: a model with a PVM that is switched on.
        every: record every n-th generated position.

    Raises:
        KeepsightError: if the model carries no such memory.
    """

    def __init__(self, model: Any, every: int = 1):
        self.branches = sorted(reading_branches(model), key=lambda branch: branch.index)
        if not self.branches:
            raise KeepsightError("This model carries no PVM that is switched on, so nothing is retrieved.")
        self.backbone, self.every = Backbone.of(model), every
        self._watch = GenerationWatch(self.backbone)
        self._handles: list[Any] = []
        self._begin()

    def _begin(self) -> None:
        self._now = 0
        self._layout: VisualLayout | None = None
        self._weights: dict[int, dict[int, torch.Tensor]] = {}
        self._update: dict[int, dict[int, torch.Tensor]] = {}

    def __enter__(self) -> RetrievalMeter:
        self._handles = [
            *self._watch.hooks(),
            self.backbone.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
        ]
        for branch in self.branches:
            for _, block in branch.active_blocks:
                if block.reads_memory:
                    self._handles.append(block.register_forward_hook(self._note(branch.index)))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, decoder: Any, args: tuple, kwargs: dict) -> None:
        call = self._watch.call(args, kwargs)
        if call is None:
            return
        if call.start == 0:
            self._begin()
        found = self._watch.take()
        if found is not None and self._layout is None:
            self._layout = found[1][0]
        self._now = call.step

    def _note(self, index: int) -> Any:
        @torch.no_grad()
        def note(block: Any, args: tuple, output: torch.Tensor) -> None:
            if not self._watch.is_here or self._now % self.every:
                return
            x, key = args[0][:1, -1:], args[1][:1]
            mask = args[3][:1] if len(args) > 3 and args[3] is not None else None
            h = block.input_norm(block.text_reducer(x.to(block.text_reducer.weight.dtype)))
            attention = block.cross_attn
            query = attention.q_norm(attention._heads(attention.q_proj(h))).transpose(1, 2)  # [1, H, 1, d]
            grouped = query.reshape(1, key.shape[1], -1, query.shape[-1])
            scores = torch.matmul(grouped, key.transpose(2, 3)).float() * query.shape[-1] ** -0.5
            if mask is not None:
                scores = scores.masked_fill(~mask[:, :, -1:], float("-inf"))
            self._weights.setdefault(self._now, {})[index] = scores.softmax(-1).mean((0, 1, 2))
            update = output[0, -1].float().norm() / args[0][0, -1].float().norm().clamp(min=1e-12)
            self._update.setdefault(self._now, {})[index] = update

        return note

    @property
    def seen(self) -> bool:
        """Whether anything was retrieved."""
        return bool(self._weights) and self._layout is not None

    @property
    def trace(self) -> RetrievalTrace:
        """What was recorded in the last generation.

        Raises:
            KeepsightError: if nothing was retrieved (no generation, or no image in the prompt).
        """
        layers = [branch.index for branch in self.branches]
        steps = [t for t in sorted(self._weights) if len(self._weights[t]) == len(layers)]
        if not steps or self._layout is None:
            raise KeepsightError("Nothing was retrieved: generate inside the block, with an image in the prompt.")
        weights = torch.stack([torch.stack([self._weights[t][i].cpu() for i in layers]) for t in steps])
        update = torch.stack([torch.stack([self._update[t][i].cpu() for i in layers]) for t in steps])
        return RetrievalTrace(
            np.array(layers, np.int64), np.array(steps, np.int64), weights.numpy(), update.numpy(), self._layout
        )


def reading_branches(model: Any) -> list[PvmBranch]:
    """The PVM branches that are switched on and look at a memory (the control's parallel MLP does not)."""
    found = [module for module in model.modules() if isinstance(module, PvmBranch)]
    return [branch for branch in found if any(block.reads_memory for _, block in branch.active_blocks)]
