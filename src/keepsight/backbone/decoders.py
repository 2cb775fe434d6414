"""The shapes that a decoder layer can have, told apart by the names of its parts, whatever family it is from.

A layer is a residual stream with two branches, a token mixer and a feed-forward network (FFN):

    x = x + mixer(norm(x))
    x = x + leave(ffn(enter(x)))

A memory reads x where it enters the FFN's branch, and adds to what leaves it: behind a norm that follows the FFN, or
the norm would undo the gate. A layer with a norm that no shape knows is refused: nobody knows what stands behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

#: Token mixers: softmax attention, or what stands in its place in some layers of hybrid models.
MIXERS = ("self_attn", "linear_attn", "conv")


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """One shape of decoder layers. Names are attributes of the layer.

    Attributes:
        enter: the module that is given the residual stream: the FFN's norm, or the FFN itself.
        ffn: the feed-forward network, dense or mixture of experts.
        leave: the module whose output is added to the residual stream: a norm behind the FFN, or the FFN itself.
        norms: further norms that such layers have.
    """

    enter: str = "post_attention_layernorm"
    ffn: str = "mlp"
    leave: str = "mlp"
    norms: tuple[str, ...] = ("input_layernorm",)

    @property
    def needed(self) -> tuple[str, ...]:
        """What a layer must have."""
        return tuple(dict.fromkeys((self.enter, self.ffn, self.leave)))

    def fits(self, layer: nn.Module) -> bool:
        """Whether a layer has all of these parts and no norm besides."""
        known = {*self.needed, *self.norms}
        return all(hasattr(layer, name) for name in self.needed) and not unknown_norms(layer, known)


def unknown_norms(layer: nn.Module, known: set[str]) -> list[str]:
    """Norms of a decoder layer other than those."""
    return [name for name, _ in layer.named_children() if "norm" in name and name not in known]


PLAIN = LayerParts()
_SANDWICHED = ("input_layernorm", "post_attention_layernorm")
SHAPES = (
    # Muse Spark: gates that join each branch with the stream, and return it. Before Gemma's, which its names fit too.
    LayerParts(
        enter="pre_feedforward_layernorm",
        leave="post_feedforward_residual_gate",
        norms=(*_SANDWICHED, "post_feedforward_layernorm"),
    ),
    PLAIN,  # Llama, Qwen, Mistral, Gemma 1
    LayerParts(  # Gemma 2 to 4: a norm behind each branch; Gemma 4 also norms its experts and its embeddings per layer
        enter="pre_feedforward_layernorm",
        leave="post_feedforward_layernorm",
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
            "post_per_layer_input_norm",
        ),
    ),
    LayerParts(leave="post_mlp_layernorm", norms=("input_layernorm", "post_self_attn_layernorm")),  # GLM-4
    LayerParts(enter="mlp", leave="post_feedforward_layernorm", norms=("post_attention_layernorm",)),  # EXAONE 4
    LayerParts(ffn="feed_forward", leave="feed_forward"),  # Llama 4
    LayerParts(enter="ffn_norm", ffn="feed_forward", leave="feed_forward", norms=("operator_norm",)),  # LFM2
    LayerParts(  # LFM3: the same between two norms
        enter="ffn_norm", ffn="feed_forward", leave="post_ffn_norm", norms=("operator_norm", "post_operator_norm")
    ),
    LayerParts(leave="post_norm2", norms=("input_layernorm", "post_norm1")),  # HyperCLOVA X
    LayerParts(enter="feedforward_layernorm", norms=("attention_layernorm",)),  # Apertus
    LayerParts(enter="input_layernorm", norms=()),  # Cohere 2: mixer and FFN side by side, behind one norm
)


def layer_parts(layer: nn.Module) -> LayerParts | None:
    """The shape of a decoder layer; None if it has none that is known."""
    if not any(hasattr(layer, name) for name in MIXERS):
        return None
    return next((shape for shape in SHAPES if shape.fits(layer)), None)


def why_no_shape(layer: Any) -> str:
    """What a decoder layer without a known shape has, or has not, as a sentence."""
    if not any(hasattr(layer, name) for name in MIXERS):
        return f"It has no token mixer ({' or '.join(MIXERS)})."
    missing = [name for name in PLAIN.needed if not hasattr(layer, name)]
    if missing:
        return f"It is without {' and '.join(missing)}."
    found = unknown_norms(layer, {*PLAIN.needed, *PLAIN.norms})
    return f"It has norms of its own ({', '.join(found)}), and what they do to a memory beside the FFN is not known."
