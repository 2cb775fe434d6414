"""Which step of a generation each call of the decoder is, and where the images of its prompt stand."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.compat import find_cache
from keepsight.diagnose.instruments.layout import VisualLayout, visual_layouts
from keepsight.errors import KeepsightError
from keepsight.vismem import scope as vismem_scope


@dataclass(frozen=True)
class DecoderCall:
    """One call of the decoder.

    Attributes:
        start: slots that were read before it.
        rows, length: B and T.
        step: tokens generated before what it predicts; 0 at the end of the prompt.
        device: of its embeddings.
    """

    start: int
    rows: int
    length: int
    step: int
    device: torch.device


class GenerationWatch:
    """Sees which step each call of the decoder is, and where the images of a prompt stand, while its hooks are on.

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
        self._prompt = 0

    def hooks(self) -> list[Any]:
        """Put the hooks on; returns their handles. What happens in other threads is not seen."""
        self._thread = threading.get_ident()
        return [
            self.backbone.vision_tower.register_forward_pre_hook(self._see_grids, with_kwargs=True),
            self.backbone.vlm.register_forward_pre_hook(self._see_prompt, with_kwargs=True),
        ]

    @property
    def is_here(self) -> bool:
        """Whether what happens now is watched: in this thread, and no latent memory is being formed."""
        return threading.get_ident() == self._thread and not vismem_scope.is_base_only()

    def call(self, args: tuple, kwargs: dict) -> DecoderCall | None:
        """What the decoder is called for; None if it is not watched, or given no embeddings."""
        embeds = self.backbone.decoder_input(args, kwargs)
        if embeds is None or not self.is_here:
            return None
        cache = find_cache(args, kwargs)
        start = int(cache.get_seq_length()) if cache is not None else 0
        rows, length = embeds.shape[:2]
        # A prompt may come in several chunks; later ones, where a latent memory is watched for, are memories.
        if start == 0 or (length > 1 and vismem_scope.current_watch() is None):
            self._prompt = start + length
        return DecoderCall(start, rows, length, start + length - self._prompt, embeds.device)

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
