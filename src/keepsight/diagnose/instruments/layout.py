"""Where each visual token lies in its image: from positions in the prompt to patches, images and video frames.

Visual tokens stand in the prompt in the order in which the vision encoder emits them: image by image, frame by frame,
row by row. Families with dynamic resolution (Qwen) say the grid of every image in the call's arguments; elsewhere one
unbroken run of tokens is one image, whose grid is known if the run is a square. Tokens of tiled views (InternVL's and
LLaVA-OneVision's high resolution) belong to their image but get no place of their own.
"""

from __future__ import annotations

import inspect
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError


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


class PromptWatch:
    """Sees where the images of each call stand, while its hooks are on.

    generate() of newer transformers encodes the images before it calls the model, so the grids are read where every
    version hands them over: at the vision tower.

    Args:
        backbone: the model's parts.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self._arguments = list(inspect.signature(backbone.vlm.forward).parameters)
        self._encoder_arguments = list(inspect.signature(backbone.vision_tower.forward).parameters)
        self.has_grids = "grid_thw" in self._encoder_arguments
        self._encoded: list[list[tuple[int, ...]]] = []  # grids of each call of the vision tower
        self._given: dict[str, Any] | None = None  # arguments of the VLM's call that is under way
        self._tower_ran = False
        self._thread = threading.get_ident()

    def hooks(self) -> list[Any]:
        """Put the hooks on; returns their handles. What happens in other threads is not seen."""
        self._thread = threading.get_ident()
        return [
            self.backbone.vision_tower.register_forward_pre_hook(self._see_grids, with_kwargs=True),
            self.backbone.vlm.register_forward_pre_hook(self._see_prompt, with_kwargs=True),
        ]

    def take(self) -> tuple[torch.Tensor, list[VisualLayout]] | None:
        """Visual mask [B, T] and B layouts of the call that is under way, once; None if it brings no images.

        Raises:
            KeepsightError: if images came in and cannot be found.
        """
        given, self._given = self._given, None
        tower_ran, self._tower_ran = self._tower_ran, False
        if given is None:
            if tower_ran:
                raise KeepsightError(
                    f"The vision encoder ran and {self.backbone.decoder_path} was called, but not as a part of a call "
                    f"of {type(self.backbone.vlm).__name__}, where it can be seen which positions are visual."
                )
            return None
        modalities = self.backbone.given_modalities(given)
        if not modalities and tower_ran:
            modalities = {modality for modality, _ in self.backbone.family.visual_tokens}
        if not modalities:
            return None
        ids = given.get("input_ids")
        mask = self.backbone.visual_mask(ids, given.get("inputs_embeds"), modalities)
        if not mask.any():
            raise KeepsightError(
                "The call brings visual input, and no position of it is visual: looked for the token ids "
                f"{list(self.backbone.visual_token_ids(modalities))} and found none."
            )
        grids, copies = self._grids(given) if self.has_grids else (None, 1)
        self._encoded = []
        return mask, visual_layouts(self.backbone, ids, mask, grids, copies)

    def _see_grids(self, tower: Any, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() != self._thread:
            return
        self._tower_ran = True
        if self.has_grids:
            grid = (dict(zip(self._encoder_arguments, args, strict=False)) | kwargs).get("grid_thw")
            if grid is not None:
                self._encoded.append([tuple(int(n) for n in row) for row in grid])

    def _see_prompt(self, vlm: Any, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() == self._thread:
            self._given = dict(zip(self._arguments, args, strict=False)) | kwargs
            self._tower_ran = False  # `generate` encodes the images before, and hands them over

    def _grids(self, given: dict[str, Any]) -> tuple[dict[str, list[tuple[int, ...]]], int]:
        """Grids (frames, height, width in patches) by modality, and how often every row of the prompt is repeated."""
        grids: dict[str, list[tuple[int, ...]]] = {}
        copies = 1
        for kind in ("image", "video"):
            direct = given.get(f"{kind}_grid_thw")
            encoded = (given.get("mm_encoder_outputs") or {}).get(kind)
            if direct is not None:
                grids[kind] = [tuple(int(n) for n in row) for row in direct]
            elif encoded is not None:
                features = getattr(encoded, "pooler_output", None)
                lengths = [len(f) for f in features] if isinstance(features, (list, tuple)) else []
                for call in self._encoded:  # the call that made these features
                    sizes = sorted(t * h * w // self.backbone.merge_side**2 for t, h, w in call)
                    times = len(lengths) // len(call)
                    if times and sorted(sizes * times) == sorted(lengths):
                        grids[kind], copies = call, times
                        self._encoded.remove(call)
                        break
        return grids, copies


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
