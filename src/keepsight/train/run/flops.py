"""Floating-point operations of a VLM, estimated from the shapes of its weights.

The usual count (Kaplan et al., arXiv 2001.08361, appendix B; Hoffmann et al., arXiv 2203.15556, appendix F), for B rows
of T positions, with P weights that every position is multiplied with, A the summed attention widths of the layers
(heads x head_dim) and V weights for every patch:

    forward   2 P B T  +  2 A B T^2  +  2 V patches       a multiply and an add per weight; the two products of causal
                                                          attention, of which half the square is needed
    backward  (share of the decoder above its lowest trained layer) x the decoder's forward, for the activations;
              plus 2 (trained weights) B T, for the weights
    checkpointing adds one forward of the decoder; tokens made one by one with a cache cost what one forward over
    prompt and completion costs

Left out: norms, softmax, rotary embeddings, attention inside the vision encoder, the optimiser. Padding counts: it is
computed. Of a mixture of experts the experts that a token visits are counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from keepsight.backbone import Backbone


@dataclass(frozen=True)
class ModelShape:
    """What a model's arithmetic depends on.

    Attributes:
        text: P, weights that every text position is multiplied with, the head and a PVM branch included.
        attention: A, heads x head_dim, summed over the layers with softmax attention.
        vision: V, weights that every patch of an image is multiplied with.
        trained_text, trained_vision: how many of these are trained.
        trained_depth: share of the decoder's layers above the lowest trained one, it included; 0 to 1.
        patch_area: pixels of one patch.
    """

    text: int
    attention: int
    vision: int
    trained_text: int
    trained_vision: int
    trained_depth: float
    patch_area: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a model as it is now: its adapters, and what of it is trained. Meta tensors will do."""
        backbone = Backbone.of(model)
        config, count = backbone.text_config, len(backbone.layers)
        experts = getattr(config, "num_experts", None)
        routed = (getattr(config, "num_experts_per_tok", 1) / experts) if experts else 1.0
        text = trained = 0.0
        lowest = count
        for index, layer in enumerate(backbone.layers):
            for name, weight in layer.named_parameters():
                size = _matrix_size(weight) * (routed if ".experts." in f".{name}" else 1.0)
                text += size
                if weight.requires_grad:
                    trained += size
                    lowest = min(lowest, index)
        head = backbone.model.get_output_embeddings()
        table = backbone.model.get_input_embeddings()
        for name, weight in head.named_parameters() if head is not None else ():
            if name.endswith("weight"):
                text += _matrix_size(weight)
                trained += _matrix_size(weight) * weight.requires_grad
        if any(weight.requires_grad for weight in table.parameters()):
            lowest = 0
        vision = [*backbone.vision_tower.parameters()]
        inside = {id(weight) for weight in vision}
        vision += [weight for weight in backbone.projector.parameters() if id(weight) not in inside]
        if any(weight.requires_grad for weight in vision):
            lowest = 0
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        patch = config_patch_size(backbone.model.config)
        return cls(
            text=round(text),
            attention=sum(map(Backbone.has_softmax_attention, backbone.layers)) * config.num_attention_heads * head_dim,
            vision=sum(map(_matrix_size, vision)),
            trained_text=round(trained),
            trained_vision=sum(_matrix_size(weight) for weight in vision if weight.requires_grad),
            trained_depth=(count - lowest) / count if count else 0.0,
            patch_area=patch * patch,
        )

    def decoder(self, rows: int, length: int, cached: int = 0) -> float:
        """FLOPs of the decoder's forward over `rows` rows of `length` positions, the first `cached` read before."""
        return 2.0 * self.text * rows * (length - cached) + 2.0 * self.attention * rows * (length**2 - cached**2)

    def forward(self, rows: int, length: int, patches: int = 0, cached: int = 0) -> float:
        """FLOPs of one forward; also of generating, with `length` the positions of prompt and completion together."""
        return self.decoder(rows, length, cached) + 2.0 * self.vision * patches

    def train(self, rows: int, length: int, patches: int = 0, checkpointing: bool = False, cached: int = 0) -> float:
        """FLOPs of one forward and backward, both over what follows the first `cached` positions."""
        forward = self.decoder(rows, length, cached)
        backward = self.trained_depth * forward + 2.0 * self.trained_text * rows * (length - cached)
        vision = 2.0 * self.vision * patches
        if self.trained_vision:
            vision *= 3 + checkpointing
        return forward * (1 + checkpointing) + backward + vision

    def patches(self, batch: Mapping[str, Any]) -> int:
        """Patches in a batch as a processor makes it: rows of `pixel_values` [P, C], or images [..., 3, H, W]."""
        count = 0
        for name in ("pixel_values", "pixel_values_videos"):
            pixels = batch.get(name)
            if isinstance(pixels, torch.Tensor) and pixels.dim() == 2:
                count += pixels.shape[0]
            elif isinstance(pixels, torch.Tensor):
                count += pixels.numel() // 3 // self.patch_area
        return count


def config_patch_size(config: Any) -> int:
    """Side of a patch in pixels."""
    size = config.vision_config.patch_size
    return int(size[0]) if isinstance(size, (list, tuple)) else int(size)


def parameter_count(weight: torch.Tensor) -> int:
    """Entries of a parameter, also where it is partitioned (DeepSpeed) or packed (bitsandbytes)."""
    packed = getattr(getattr(weight, "quant_state", None), "shape", None)
    if packed is not None:
        return int(torch.Size(packed).numel())
    return int(getattr(weight, "ds_numel", weight.numel()))


def _matrix_size(weight: torch.Tensor) -> int:
    """Entries of a matrix; 0 for biases, norms and gates."""
    shape = getattr(weight, "ds_shape", weight.shape)
    return parameter_count(weight) if len(shape) >= 2 else 0
