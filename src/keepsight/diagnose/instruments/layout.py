"""Map visual tokens to places: from positions in the prompt to patches, images and video frames.

Visual tokens stand in the prompt in the order in which the vision encoder emits them: image by image, frame by frame,
row by row. Families with dynamic resolution (Qwen) say the grid of every image in the call's arguments; elsewhere one
unbroken run of tokens is one image, whose grid is known if the run is a square. Tokens of tiled views (InternVL's and
LLaVA-OneVision's high resolution) belong to their image but get no place of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone


@dataclass(frozen=True)
class Item:
    """One image or video of a prompt.

    Attributes:
        kind: "image" or "video".
        frames: temporal patches (1 for an image).
        height, width: visual tokens per column and per row of one frame; 0 if the grid is unknown.
    """

    kind: str
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class VisualLayout:
    """Where the M visual tokens of one sequence lie. All arrays are [M] int64, in prompt order.

    Attributes:
        items: the images and videos, in prompt order.
        item: which of `items` a token belongs to.
        frame, y, x: its place in that item's grid of visual tokens; -1 where it has none.
        slots: its position in the prompt [0, T).
    """

    items: tuple[Item, ...]
    item: np.ndarray
    frame: np.ndarray
    y: np.ndarray
    x: np.ndarray
    slots: np.ndarray

    @property
    def edge(self) -> np.ndarray:
        """Bool [M]: the token lies on the border of its image."""
        height = np.array([item.height for item in self.items], np.int64)[self.item]
        width = np.array([item.width for item in self.items], np.int64)[self.item]
        border = (self.y == 0) | (self.x == 0) | (self.y == height - 1) | (self.x == width - 1)
        return border & (self.y >= 0)

    def maps(self, weights: np.ndarray) -> list[np.ndarray]:
        """Spread weights [..., M] over the grids: one array [..., frames, height, width] per item with a known grid.

        An item without a known grid gives an array of shape [..., frames, 0, 0].
        """
        found = []
        for index, item in enumerate(self.items):
            grid = np.zeros((*weights.shape[:-1], item.frames, item.height, item.width), weights.dtype)
            mine = (self.item == index) & (self.y >= 0)
            grid[..., self.frame[mine], self.y[mine], self.x[mine]] = weights[..., mine]
            found.append(grid)
        return found


def visual_layouts(
    backbone: Backbone,
    input_ids: torch.Tensor | None,
    mask: torch.Tensor,
    grids: dict[str, list[tuple[int, ...]]] | None,
    copies: int = 1,
) -> list[VisualLayout]:
    """The layout of every row of a prompt.

    Args:
        backbone: the model's parts.
        input_ids: [B, T], to tell video from image tokens; None takes all for image tokens.
        mask: bool [B, T], true at visual positions.
        grids: modality -> (frames, height, width) in patches of all its items, in prompt order; None for families
            that have no such grids.
        copies: how many neighbouring rows share one set of grids (several sequences per prompt).

    Returns:
        B layouts.
    """
    video_ids = set(backbone.visual_token_ids(("video",))) - set(backbone.visual_token_ids(("image",)))
    queues = {kind: list((grids or {}).get(kind, [])) for kind in ("image", "video")}
    layouts: list[VisualLayout] = []
    for row in range(mask.shape[0]):
        if row % copies:
            layouts.append(layouts[-1])
            continue
        slots = mask[row].nonzero().squeeze(1).cpu().numpy()
        tokens = [] if input_ids is None else input_ids[row].tolist()
        kinds = ["video" if tokens and tokens[s] in video_ids else "image" for s in slots]
        found = _by_run(slots, kinds) if grids is None else _by_grid(kinds, queues, backbone.merge_side)
        item, frame, y, x = found[1]
        layouts.append(VisualLayout(tuple(found[0]), item, frame, y, x, slots))
    return layouts


def _by_grid(kinds: list[str], grids: dict[str, Any], merge: int) -> tuple[list[Item], np.ndarray]:
    """Items and places [4, M] (item, frame, y, x) of one row, taking one grid after the other from `grids`.

    Rows share the grids, so they are consumed. A video's frames may have text between them.
    """
    items: list[Item] = []
    places: list[np.ndarray] = []
    at = 0
    while at < len(kinds):
        kind = kinds[at]
        if grids[kind]:
            t, h, w = grids[kind].pop(0)
            item = Item(kind, t, h // merge, w // merge)
            count = min(item.frames * item.height * item.width, len(kinds) - at)
            place = np.stack(np.unravel_index(np.arange(count), (item.frames, item.height, item.width)))
        else:  # a chunk of a prompt, whose grids are not known
            item, count = Item(kind, 1, 0, 0), len(kinds) - at
            place = np.full((3, count), -1)
        places.append(np.concatenate([np.full((1, count), len(items)), place]))
        items.append(item)
        at += count
    return items, np.concatenate(places, 1).astype(np.int64) if places else np.zeros((4, 0), np.int64)


def _by_run(slots: np.ndarray, kinds: list[str]) -> tuple[list[Item], np.ndarray]:
    """The same for one unbroken run of tokens per image, whose grid is known where the run is a square."""
    items: list[Item] = []
    places: list[np.ndarray] = []
    for run in np.split(np.arange(len(slots)), np.flatnonzero(np.diff(slots) > 1) + 1):
        if not len(run):
            continue
        side = math.isqrt(len(run))
        square = side * side == len(run)
        place = np.full((3, len(run)), -1)
        if square:
            place = np.stack(np.unravel_index(np.arange(len(run)), (1, side, side)))
        places.append(np.concatenate([np.full((1, len(run)), len(items)), place]))
        items.append(Item(kinds[run[0]], 1, side if square else 0, side if square else 0))
    return items, np.concatenate(places, 1).astype(np.int64) if places else np.zeros((4, 0), np.int64)


def joined(known: list[VisualLayout], new: list[VisualLayout], start: int, batch: int) -> list[VisualLayout]:
    """Layouts of a prompt that came in several calls.

    Args:
        known: of the earlier calls, one a row; empty if there was no image in them.
        new: of a call at position `start`, likewise.
        start, batch: where it begins, and its rows.
    """
    empty = np.zeros(0, np.int64)
    known = known or [VisualLayout((), empty, empty, empty, empty, empty)] * batch
    if not new:
        return known
    whole = []
    for a, b in zip(known, new, strict=True):
        frame, y, x = (np.concatenate([getattr(a, n), getattr(b, n)]) for n in ("frame", "y", "x"))
        item = np.concatenate([a.item, b.item + len(a.items)])
        whole.append(VisualLayout(a.items + b.items, item, frame, y, x, np.concatenate([a.slots, b.slots + start])))
    return whole
