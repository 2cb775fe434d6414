"""`Backbone`: the parts of one VLM, by role, and what the memories ask of them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from keepsight.backbone.decoders import MIXERS, LayerParts, layer_parts, why_no_shape
from keepsight.backbone.parts import Family, VisionParts
from keepsight.backbone.table import family_of
from keepsight.errors import KeepsightError, UnsupportedModelError

_PIXELS = {"pixel_values": "image", "pixel_values_videos": "video"}
#: Arguments of a VLM with floating-point tensors of two or more dimensions that hold no image.
_TEXT_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids")  # Qwen3-Omni counts positions in floats


def _has(module: nn.Module, name: str) -> bool:
    return hasattr(module, name.partition(".")[0])


def _holds_features(value: Any) -> bool:
    """Whether an argument holds pixels or visual features: floating-point tensors of at least two dimensions."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and value.ndim >= 2
    if isinstance(value, Mapping):
        return any(_holds_features(item) for item in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_features(item) for item in value)


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
        names = {module: name for name, module in model.named_modules()}
        decoder = model.get_decoder()
        while not hasattr(decoder, "layers") and decoder is not (inner := decoder.get_decoder()):
            decoder = inner  # a language model with its head
        path = names[decoder]
        vlm_path = path.rpartition(".")[0]
        while vlm_path and not _has(model.get_submodule(vlm_path), family.vision_tower):
            vlm_path = vlm_path.rpartition(".")[0]
        backbone = cls(model, family, model.get_submodule(vlm_path), decoder, path)
        for index, layer in enumerate(backbone.layers):
            if layer_parts(layer) is None:
                raise UnsupportedModelError(
                    f"Decoder layer {index} of {type(model).__name__} is a {type(layer).__name__}, whose parts are not "
                    f"known. {why_no_shape(layer)} A memory needs layers with a token mixer, a norm and a "
                    "feed-forward network under names that are known (docs/families.md). The family is supported with "
                    "another language model; for this one, open an issue at keepsight's repository that names it."
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
        return int(self.family.merge_side(self.model.config))

    @functools.cached_property
    def vision(self) -> VisionParts:
        """How the vision encoder is built.

        Raises:
            UnsupportedModelError: if the family's row does not say: there is no VisMem on it.
        """
        return self.family.vision_parts(self.model.config)

    @property
    def vision_blocks(self) -> Any:
        """The blocks of the vision encoder."""
        return self.vision_tower.get_submodule(self.vision.blocks)

    @property
    def vision_size(self) -> int:
        """Width of the vision encoder."""
        return int(getattr(self.model.config.vision_config, self.vision.width))

    @property
    def embedding_scale(self) -> float:
        """What the input embedding multiplies the rows of its matrix by (Gemma: the root of the width; else 1)."""
        table = self.model.get_input_embeddings()
        if table.weight.is_meta:
            return 1.0
        with torch.no_grad():
            ids = torch.arange(min(64, len(table.weight)), device=table.weight.device)
            rows = table.weight[ids].float().norm()
            return float(table.forward(ids).float().norm() / rows) if rows else 1.0

    @property
    def windowed_vision_blocks(self) -> frozenset[int]:
        """Vision blocks whose attention stays inside windows of the image (Qwen2.5-VL)."""
        full = getattr(self.vision_tower, "fullatt_block_indexes", None)
        return frozenset() if full is None else frozenset(range(len(self.vision_blocks))) - frozenset(full)

    def position_table(self) -> torch.Tensor | None:
        """The vision encoder's learned positions, as a picture [1, d, side, side]; None if it has none."""
        if self.vision.position_table is None:
            return None
        table: Any = self.vision_tower
        for name in self.vision.position_table.split("."):
            table = getattr(table, name)
        table = table.reshape(-1, table.shape[-1])[int(self.vision.class_token) :]
        side = int(table.shape[0] ** 0.5)
        return table.view(side, side, -1).permute(2, 0, 1)[None]

    def project_vision(self, states: torch.Tensor) -> torch.Tensor:
        """The model's own projector, on positions of our own instead of an image's patches.

        Args:
            states: [N, s * s, d * layers read], the vision encoder's states where the projector reads them; s is
                `merge_side`, and each square of s x s positions, row by row, becomes one token.

        Returns:
            [N, D], in the decoder's width.
        """
        return self.vision.project(self, states)

    @property
    def patches_are_in_order(self) -> bool:
        """Whether each s * s consecutive positions of the vision encoder become one visual token, in their order."""
        return not self.vision.class_token and (self.merge_side == 1 or not self.vision.raster)

    @property
    def unread_positions(self) -> int:
        """How many positions at the start of each image the projector is not given: a class token."""
        usual = "default" if self.vision.class_token else None
        return int(getattr(self.model.config, "vision_feature_select_strategy", usual) == "default")

    def value_behind(self, name: str) -> int:
        """What an input with one value per token says of text behind a prompt: text that is seen, and no image."""
        return {"attention_mask": 1, "token_type_ids": self.family.text_type}.get(name, 0)

    def vision_layers_read(self) -> tuple[int, ...]:
        """After how many blocks the projector reads the vision encoder's states (usually after the last, once)."""
        depth = len(self.vision_blocks)
        config = self.model.config  # ViP-LLaVA's says "layers" in older transformers
        wanted: Any = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
        wanted = [wanted] if isinstance(wanted, int) else list(wanted)
        return tuple(layer % (depth + 1) for layer in wanted)

    def visual_token_ids(self, modalities: Collection[str] = ("image", "video")) -> tuple[int, ...]:
        """Ids of the placeholder tokens that the visual embeddings of `modalities` replace."""
        names = (name for modality, name in self.family.visual_tokens if modality in modalities)
        return tuple(dict.fromkeys(getattr(self.model.config, name) for name in names))

    @staticmethod
    def parts(layer: nn.Module) -> LayerParts:
        """Where the feed-forward network of a decoder layer is entered and left, by name."""
        parts = layer_parts(layer)
        assert parts is not None, "Backbone.of has seen to it"
        return parts

    @staticmethod
    def norm(layer: nn.Module) -> nn.Module:
        """A norm of a decoder layer beside its feed-forward network: it has the layer's device and dtype, in four
        bits too."""
        parts = Backbone.parts(layer)
        return layer.get_submodule(parts.enter if parts.enter != parts.ffn else parts.leave)

    @staticmethod
    def mixer(layer: nn.Module) -> nn.Module:
        """The token mixer of a decoder layer: softmax attention, or linear attention in hybrid models."""
        return next(getattr(layer, name) for name in MIXERS if hasattr(layer, name))

    @staticmethod
    def has_softmax_attention(layer: nn.Module) -> bool:
        """Whether the layer can attend back to any earlier position (a linear mixer only keeps a fixed-size state)."""
        return hasattr(layer, "self_attn")

    @functools.cached_property
    def has_sliding_windows(self) -> bool:
        """Whether some layers see only the latest positions, counted by where they lie, padding included."""
        return any(DynamicCache(config=self.text_config).is_sliding)

    @functools.cached_property
    def needs_padding(self) -> bool:
        """Whether the decoder, called by itself on a sequence without padding, is not causal.

        transformers leaves out a mask that hides nothing but the future, and lets the attention's own `is_causal` speak
        for it. PaliGemma's says that it is not, because its prompts are read both ways.
        """
        return any(getattr(self.mixer(layer), "is_causal", True) is False for layer in self.layers)

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

        Raises:
            KeepsightError: if both are None.
        """
        tokens = self.visual_token_ids(modalities)
        if input_ids is not None:
            return torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
        if inputs_embeds is None:
            raise KeepsightError(
                "Which positions are visual cannot be told: looked for input_ids or inputs_embeds among what the model "
                "was given, and found neither. Give one of them under that name."
            )
        table = self.vlm.get_input_embeddings()
        mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        for token in tokens:
            row = table(torch.tensor(token, device=inputs_embeds.device)).to(inputs_embeds.dtype)
            mask |= (inputs_embeds == row).all(-1)
        return mask
