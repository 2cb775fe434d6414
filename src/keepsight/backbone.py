"""Backbone: all that a memory must know of a VLM family, one small entry per family.

A family is *added* by one row in `FAMILIES` and one row in the tests' table. Everything else in keepsight asks the
backbone and never looks at a model's class. This module knows transformers and nothing of keepsight's methods.

The decoders of all families share one shape, on which the memories rest:

    vlm (x.model)                      embeds the text, writes visual embeddings over the placeholder tokens
      vision tower, projector
      decoder (language_model)         takes `inputs_embeds` [B, T, D]
        layers[i]
          self_attn | linear_attn      the token mixer; receives the decoder's extra keyword arguments
          post_attention_layernorm     its input is the residual stream after the mixer
          mlp                          the feed-forward network, dense or mixture of experts
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keepsight.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class VisionParts:
    """How a family's vision encoder is built: what a memory needs to run it with positions of its own in it.

    Every block of every family is x + scale * attention(norm(x)), then x + scale * mlp(norm(x)). Names are attributes
    of the block, of its attention, or (where it says so) of the vision tower. The defaults are Qwen's.

    Attributes:
        blocks: dotted attribute of the tower: the list of blocks.
        norms: the two norms of a block.
        attention: the attention of a block.
        mlp: the feed-forward network of a block.
        scales: parameters that multiply the two updates (InternVL).
        qkv: the attention's input projections: one fused layer, or three.
        qk_norms: norms of q and k, over all heads at once (InternVL).
        output: the attention's output projection.
        rotary: attribute of the tower that makes rotary embeddings, (x, coordinates [S, 2]) -> (cos, sin).
        position_table: dotted attribute of the tower: the learned positions of a square grid.
        class_token: the first position of every image is no patch (and has the first learned position).
        final_norm: norm of the tower after the last block.
        shuffles: the projector takes squares of patches, made by the VLM's `pixel_shuffle`.
    """

    blocks: str = "blocks"
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: str = "attn"
    mlp: str = "mlp"
    scales: tuple[str, ...] = ()
    qkv: tuple[str, ...] = ("qkv",)
    qk_norms: tuple[str, ...] = ()
    output: str = "proj"
    rotary: str | None = "rotary_pos_emb"
    position_table: str | None = None
    class_token: bool = False
    final_norm: str | None = None
    shuffles: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between VLM families. Names are attributes of the VLM's base model (`model.model`).

    Attributes:
        name: what people call the family.
        vision_tower: attribute that holds the vision encoder.
        projector: dotted attribute of the module that maps vision features into the decoder's width.
        visual_tokens: (modality, config attribute with the id of the placeholder token that its embeddings replace).
        merge_side: dotted config attribute with the number of patches, per side, that one visual token stands for
            (`None`: one patch per visual token).
        merge_side_is_ratio: the attribute holds 1 / side (InternVL's pixel-shuffle ratio).
        vision: how the vision encoder is built.
    """

    name: str
    vision_tower: str
    projector: str
    visual_tokens: tuple[tuple[str, str], ...] = (("image", "image_token_id"), ("video", "video_token_id"))
    merge_side: str | None = None
    merge_side_is_ratio: bool = False
    vision: VisionParts = VisionParts()


_QWEN_STYLE: dict[str, Any] = {
    "vision_tower": "visual",
    "projector": "visual.merger",
    "merge_side": "vision_config.spatial_merge_size",
    "vision": VisionParts(position_table="pos_embed.weight"),
}

#: `config.model_type` -> family. One row adds a family.
FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family(name="Qwen3-VL", **_QWEN_STYLE),
    "qwen3_vl_moe": Family(name="Qwen3-VL (mixture of experts)", **_QWEN_STYLE),
    "qwen2_5_vl": Family(name="Qwen2.5-VL", **(_QWEN_STYLE | {"vision": VisionParts()})),
    "qwen3_5": Family(name="Qwen3.5", **_QWEN_STYLE),
    "qwen3_5_moe": Family(name="Qwen3.5 (mixture of experts)", **_QWEN_STYLE),
    "internvl": Family(
        name="InternVL",
        vision_tower="vision_tower",
        projector="multi_modal_projector",
        visual_tokens=(("image", "image_token_id"),),
        merge_side="downsample_ratio",
        merge_side_is_ratio=True,
        vision=VisionParts(
            blocks="encoder.layer",
            norms=("layernorm_before", "layernorm_after"),
            attention="attention",
            scales=("lambda_1", "lambda_2"),
            qkv=("q_proj", "k_proj", "v_proj"),
            qk_norms=("q_norm", "k_norm"),
            output="projection_layer",
            rotary=None,
            position_table="embeddings.position_embeddings",
            class_token=True,
            final_norm="layernorm",
            shuffles=True,
        ),
    ),
    "llava_onevision": Family(
        name="LLaVA-OneVision",
        vision_tower="vision_tower",
        projector="multi_modal_projector",
        vision=VisionParts(
            blocks="encoder.layers",
            norms=("layer_norm1", "layer_norm2"),
            attention="self_attn",
            qkv=("q_proj", "k_proj", "v_proj"),
            output="out_proj",
            rotary=None,
            position_table="embeddings.position_embedding.weight",
            final_norm="post_layernorm",
        ),
    ),
}

_MIXERS = ("self_attn", "linear_attn")
_PIXELS = {"pixel_values": "image", "pixel_values_videos": "video"}
#: Arguments of a VLM with floating-point tensors of two or more dimensions that hold no image.
_TEXT_ARGUMENTS = ("inputs_embeds", "attention_mask")


def _holds_features(value: Any) -> bool:
    """Whether an argument holds pixels or visual features: floating-point tensors of at least two dimensions."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and value.ndim >= 2
    if isinstance(value, Mapping):
        return any(_holds_features(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_features(item) for item in value)


def family_of(config: Any, name: str = "The model") -> Family:
    """The family of a model's configuration, known before any weight is read.

    Args:
        config: the model's transformers configuration.
        name: how to call the model in the error.

    Raises:
        UnsupportedModelError: if no row of `FAMILIES` describes it.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        supported = ", ".join(f"{family.name} ({model_type})" for model_type, family in FAMILIES.items())
        raise UnsupportedModelError(
            f"{name} (model_type {model_type!r}) is not a VLM family that keepsight knows. Supported: {supported}. To "
            "add a family, write one row for its model_type in keepsight.backbone.FAMILIES and one in "
            "tests/families.py; docs/families.md shows how."
        )
    return FAMILIES[model_type]


@dataclass(frozen=True)
class Backbone:
    """The parts of one VLM, by role. Holds references only; make it with `Backbone.of(model)`.

    Attributes:
        model: the Hugging Face model as given (without its PEFT wrapper).
        family: the row of `FAMILIES` that describes it.
        vlm: the module that merges text and visual embeddings and calls the decoder.
        decoder: the text model; its forward takes `inputs_embeds` [B, T, D].
        decoder_path: the decoder's dotted name inside `model`.
    """

    model: Any
    family: Family
    vlm: Any
    decoder: Any
    decoder_path: str

    @classmethod
    def of(cls, model: Any) -> Backbone:
        """Find the parts of `model`, which may be wrapped by PEFT.

        Raises:
            UnsupportedModelError: if the model's family is unknown or its decoder does not have the shape above.
        """
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        family = family_of(getattr(model, "config", None), type(model).__name__)
        decoder = model.get_decoder()
        path = next(name for name, module in model.named_modules() if module is decoder)
        backbone = cls(model, family, model.get_submodule(path.rpartition(".")[0]), decoder, path)
        for index, layer in enumerate(backbone.layers):
            missing = [name for name in ("post_attention_layernorm", "mlp") if not hasattr(layer, name)]
            if missing or not any(hasattr(layer, name) for name in _MIXERS):
                raise UnsupportedModelError(
                    f"Decoder layer {index} of {type(model).__name__} is a {type(layer).__name__} without "
                    f"{' and '.join(missing) or ' or '.join(_MIXERS)}. keepsight needs a token mixer, a "
                    "post_attention_layernorm and an mlp in every layer; docs/families.md shows how to add a family."
                )
        return backbone

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.decoder.layers

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder."""
        return self.model.config.get_text_config()

    @property
    def vision_tower(self) -> nn.Module:
        """The vision encoder."""
        return self.vlm.get_submodule(self.family.vision_tower)

    @property
    def projector(self) -> nn.Module:
        """The module that brings vision features into the decoder's width."""
        return self.vlm.get_submodule(self.family.projector)

    @property
    def merge_side(self) -> int:
        """Patches per side of the square that one visual token stands for (1 where nothing is merged)."""
        if self.family.merge_side is None:
            return 1
        value: Any = self.model.config
        for name in self.family.merge_side.split("."):
            value = getattr(value, name)
        return round(1 / value) if self.family.merge_side_is_ratio else int(value)

    @property
    def vision_blocks(self) -> Any:
        """The blocks of the vision encoder."""
        return self.vision_tower.get_submodule(self.family.vision.blocks)

    @property
    def vision_size(self) -> int:
        """Width of the vision encoder."""
        return int(self.model.config.vision_config.hidden_size)

    @property
    def windowed_vision_blocks(self) -> frozenset[int]:
        """Vision blocks whose attention stays inside windows of the image (Qwen2.5-VL)."""
        full = getattr(self.vision_tower, "fullatt_block_indexes", None)
        return frozenset() if full is None else frozenset(range(len(self.vision_blocks))) - frozenset(full)

    def position_table(self) -> torch.Tensor | None:
        """The vision encoder's learned positions, as a picture [1, d, side, side]; None if it has none."""
        if self.family.vision.position_table is None:
            return None
        table: Any = self.vision_tower
        for name in self.family.vision.position_table.split("."):
            table = getattr(table, name)
        table = table.reshape(-1, table.shape[-1])[int(self.family.vision.class_token) :]
        side = int(table.shape[0] ** 0.5)
        return table.view(side, side, -1).permute(2, 0, 1)[None]

    def project_vision(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own projector, on positions of our own instead of an image's patches.

        Args:
            states: [N, s * s, d], the vision encoder's last states; s is `merge_side`, and each square of s x s
                positions, row by row, becomes one token.

        Returns:
            [N, D], in the decoder's width.
        """
        count, side = states.shape[0], self.merge_side
        if not self.family.vision.shuffles:
            return self.projector(states.flatten(0, 1))
        strip = states.view(count, side, side, -1).transpose(0, 1).reshape(1, side, count * side, -1)
        return self.projector(self.vlm.pixel_shuffle(strip, scale_factor=1 / side).flatten(0, 2))

    def vision_layers_read(self) -> tuple[int, ...]:
        """After how many blocks the projector reads the vision encoder's states (usually after the last, once)."""
        depth = len(self.vision_blocks)
        wanted = getattr(self.model.config, "vision_feature_layer", -1)
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        return tuple(layer % (depth + 1) for layer in wanted)

    def visual_token_ids(self, modalities: Collection[str] = ("image", "video")) -> tuple[int, ...]:
        """Ids of the placeholder tokens that the visual embeddings of `modalities` replace."""
        names = (name for modality, name in self.family.visual_tokens if modality in modalities)
        return tuple(dict.fromkeys(getattr(self.model.config, name) for name in names))

    @staticmethod
    def mixer(layer: nn.Module) -> nn.Module:
        """The token mixer of a decoder layer: softmax attention, or linear attention in hybrid models."""
        return next(getattr(layer, name) for name in _MIXERS if hasattr(layer, name))

    @staticmethod
    def has_softmax_attention(layer: nn.Module) -> bool:
        """Whether the layer can attend back to any earlier position (a linear mixer only keeps a fixed-size state)."""
        return hasattr(layer, "self_attn")

    def given_modalities(self, arguments: Mapping[str, Any]) -> set[str]:
        """Which modalities a call of the VLM brings visual input for.

        Args:
            arguments: those of the VLM's forward, by name. Features under a name that nobody knows could be of any
                modality, and count for all.
        """
        everything = {modality for modality, _ in self.family.visual_tokens}
        found: set[str] = set()
        for name, value in arguments.items():
            if name in _TEXT_ARGUMENTS or not _holds_features(value):
                continue
            if name in _PIXELS:
                found.add(_PIXELS[name])
            else:  # encoded before the call: {"image": features}
                named = {n for n, v in value.items() if _holds_features(v)} if isinstance(value, Mapping) else set()
                found |= named if named and named <= everything else everything
        return found

    def decoder_input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """What enters the decoder [B, T, D], among the arguments of its call: by its name, or else by its shape."""
        width = self.text_config.hidden_size
        for value in (kwargs.get("inputs_embeds"), *args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[2:] == (width,):
                return value
        return None

    def visual_mask(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        modalities: Collection[str] = ("image", "video"),
    ) -> torch.Tensor:
        """Where visual embeddings enter the decoder.

        Args:
            input_ids: token ids [B, T].
            inputs_embeds: text embeddings [B, T, D] before the visual ones are written in; used without `input_ids`,
                as transformers does: a position is visual if its row equals the placeholder's embedding.
            modalities: what the call brings input for. A placeholder token without input is text like any other.

        Returns:
            Bool mask [B, T], true at image and video positions.
        """
        tokens = self.visual_token_ids(modalities)
        if input_ids is not None:
            return torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
        if inputs_embeds is None:
            raise ValueError("visual_mask needs input_ids or inputs_embeds; both are None.")
        table = self.vlm.get_input_embeddings()
        mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        for token in tokens:
            row = table(torch.tensor(token, device=inputs_embeds.device)).to(inputs_embeds.dtype)
            mask |= (inputs_embeds == row).all(-1)
        return mask
