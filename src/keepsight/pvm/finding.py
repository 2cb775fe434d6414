"""Find the images of a call: at the positions of its placeholder tokens, or where the caller says."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.backbone.lacking import lacking_beside
from keepsight.compat import has_paged_cache
from keepsight.errors import KeepsightError, KeepsightWarning
from keepsight.pvm.scope import positions_at, positions_given

ASK = (
    "This release of transformers, or a change to the model, takes another way than keepsight knows: install a release "
    "that keepsight was tested with (docs/compatibility.md), or switch the memory off (keepsight.pvm.memory_off)."
)


@dataclass
class Given:
    """One call of the VLM, while it runs.

    Attributes:
        arguments: by name.
        tower_ran: the vision encoder ran in it.
        decoder_ran: its decoder was called.
    """

    arguments: dict[str, Any]
    tower_ran: bool = False
    decoder_ran: bool = False


class ImageFinder:
    """Finds images in calls of one model.

    Args:
        backbone: the model's parts.
    """

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def modalities(self, call: Given | None) -> set[str]:
        """Which kinds of images the call brings, by its arguments, or because the vision encoder ran."""
        if call is None:
            return set()
        found = self.backbone.given_modalities(call.arguments)
        if not found and call.tower_ran:
            found = {modality for modality, _ in self.backbone.family.visual_tokens}
        return found

    def may_be_brought(self, call: Given | None, args: tuple, kwargs: dict) -> bool:
        """Whether the call must be looked at: it brings images, or embeddings of which nobody knows what they hold."""
        given = self.backbone.decoder_input(args, kwargs) if call is None else call.arguments.get("inputs_embeds")
        return given is not None or bool(self.modalities(call))

    def found(
        self, call: Given | None, args: tuple, kwargs: dict, start: Any, reads: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where images stand in this call [B, T], and what enters the decoder [B, T, D]; None, None without images."""
        modalities = self.modalities(call)
        if modalities:
            assert call is not None
            mask = self.backbone.visual_mask(
                call.arguments.get("input_ids"), call.arguments.get("inputs_embeds"), modalities
            )
            if not mask.any():
                raise KeepsightError(
                    f"The call brings visual input ({_names(call)}), and no position of it is visual: looked for the "
                    f"token ids {list(self.backbone.visual_token_ids(modalities))} in input_ids (or their embeddings "
                    "in inputs_embeds) and found none. A memory would have nothing to remember. Give the prompt its "
                    "placeholder tokens (the processor's chat template writes them), or no pixels."
                )
        elif self.may_be_brought(call, args, kwargs):
            mask = None
        else:
            if call is not None and reads and has_paged_cache(call.arguments):
                self._refuse_placeholders(call)
            return None, None
        embeds = self.backbone.decoder_input(args, kwargs)
        if embeds is None:
            if mask is None:
                return None, None
            raise KeepsightError(
                f"The call brings visual input, and {self.backbone.decoder_path} was given no embeddings: looked for a "
                f"floating-point tensor [B, T, {self.backbone.text_config.hidden_size}] among its arguments "
                f"({', '.join(kwargs) or 'none by name'}). " + ASK
            )
        if mask is None:
            mask = self._told_mask(call, kwargs, start, embeds, reads)
            if mask is None:
                return None, None
        if mask.shape != embeds.shape[:2]:
            raise KeepsightError(
                f"The VLM was given {list(mask.shape)} rows and positions and its decoder {list(embeds.shape[:2])}, so "
                "the visual memory cannot tell where the images stand. " + ASK
            )
        return mask, embeds

    def _refuse_placeholders(self, call: Given) -> None:
        """Raises KeepsightError if a step of continuous batching reads a prompt whose images did not come with it."""
        ids = call.arguments.get("input_ids")
        if ids is not None and self.backbone.visual_mask(ids).any():
            raise KeepsightError(
                "Continuous batching (generate_batch, or cache_implementation='paged') takes token ids only: the "
                "prompt holds the placeholder tokens of an image, and no pixels came with them, so neither the model "
                "nor its visual memory sees an image. Leave cache_implementation out, or serve with `keepsight serve` "
                "or vLLM."
            )

    def _told_mask(
        self, call: Given | None, kwargs: dict, start: Any, embeds: torch.Tensor, reads: bool
    ) -> torch.Tensor | None:
        """Where the caller says that images stand [B, T] in finished embeddings [B, T, D]; None without images."""
        if not positions_given():
            ours = call is None and any(name.startswith("keepsight_") for name in kwargs)  # a VisMem forms a memory
            if reads and not ours:
                warnings.warn(
                    "inputs_embeds were given and no pixels: if images are in them, the visual memory cannot know, and "
                    "is without them. Say where they stand: `with keepsight.pvm.visual_positions(mask):` around the "
                    "call (mask: bool [B, T], true at visual positions; all false says that there is no image).",
                    KeepsightWarning,
                    stacklevel=2,
                )
            return None
        mask = positions_at(int(start), *embeds.shape[:2]).to(embeds.device)
        if not mask.any():
            return None
        lacking = lacking_beside(self.backbone, kwargs, mask, None if call is None else call.arguments)
        if lacking:
            warnings.warn(
                f"{self.backbone.family.name} brings more of an image to its decoder than embeddings; inputs_embeds "
                f"came without {' and without '.join(lacking)}. The memory reads the images; the model itself, memory "
                "on or off, computes something else than from pixels. Give pixel_values and input_ids where you can.",
                KeepsightWarning,
                stacklevel=2,
            )
        return mask


def _names(call: Given) -> str:
    names = [
        name for name, value in call.arguments.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    return ", ".join(names) or "the vision encoder ran"
