"""What a family's row can say: `Family`, and `VisionParts` for VisMem, which runs the vision encoder's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keepsight.backbone.projecting import Project, in_a_row
from keepsight.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class VisionParts:
    """How a family's vision encoder is built: what a memory needs to run it with positions of its own in it.

    Every block of every family is x + scale * attention(norm(x)), then x + scale * mlp(norm(x)). Names are attributes
    of the block, of its attention, or (where it says so) of the vision tower. The defaults are Qwen's.

    Attributes:
        blocks: dotted attribute of the tower: the list of blocks.
        width: attribute of the vision configuration: the blocks' width.
        norms: the two norms of a block.
        attention: the attention of a block.
        mlp: the feed-forward network of a block.
        scales: parameters that multiply the two updates (InternVL).
        qkv: the attention's input projections: one fused layer, or three.
        qk_norms: norms of q and k, over all heads at once (InternVL).
        head_norms: norms of q and k, of every head by itself (GLM-OCR).
        output: the attention's output projection.
        rotary: attribute of the tower that makes rotary embeddings, (x, coordinates [S, 2]) -> (cos, sin).
        position_table: dotted attribute of the tower: the learned positions of a square grid.
        class_token: the first position of every image is no patch (and has the first learned position).
        padding: argument of the tower that says which patches are none: bool [images, rows, columns], false at padding.
        raster: patches lie row by row in their image, not square by square as the projector merges them.
        final_norm: norm of the tower between the last block and the projector.
        project: how the model's own projector is called on squares of positions.
    """

    blocks: str = "blocks"
    width: str = "hidden_size"
    norms: tuple[str, str] = ("norm1", "norm2")
    attention: str = "attn"
    mlp: str = "mlp"
    scales: tuple[str, ...] = ()
    qkv: tuple[str, ...] = ("qkv",)
    qk_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    output: str = "proj"
    rotary: str | None = "rotary_pos_emb"
    position_table: str | None = None
    class_token: bool = False
    padding: str | None = None
    raster: bool = False
    final_norm: str | None = None
    project: Project = in_a_row


#: The placeholder tokens of a family that takes no videos.
IMAGES = (("image", "image_token_id"),)


def _one(config: Any) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between VLM families. Names are attributes of the module that holds the vision encoder. The defaults
    are what most are called, and videos beside images.

    Attributes:
        name: what people call the family.
        vision_tower: dotted attribute that holds the vision encoder, which is called as a module.
        projector: dotted attribute of the module that maps vision features into the decoder's width.
        visual_tokens: (modality, config attribute with the id of the placeholder token that its embeddings replace).
        merge_side: from the configuration: patches, per side, that one visual token stands for.
        sees_both_ways: argument of the VLM with the types of tokens by which an image's tokens see each other, also
            later ones (`None`: as text does, or the decoder finds out by itself).
        vision: how the vision encoder is built, for VisMem; where the family takes several, by their `model_type`. None
            if VisMem cannot form its short-term memory in it.
        no_vismem: why not, as the end of a sentence; for errors and docs/families.md.
        tiles: how many of the images that the encoder saw each row holds, where it does not follow from the number of
            its visual tokens: (backbone, input_ids [B, T], arguments of the call) -> [B]; None where it does.
        text_type: in `token_type_ids`, what follows the prompt; PaliGemma reads what is 0 in both directions.
        tested: at which sizes, beyond tiny random models, its memory was run; for docs/families.md.
    """

    name: str
    vision_tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    visual_tokens: tuple[tuple[str, str], ...] = (("image", "image_token_id"), ("video", "video_token_id"))
    merge_side: Callable[[Any], int] = _one
    sees_both_ways: str | None = None
    vision: VisionParts | Mapping[str, VisionParts] | None = None
    no_vismem: str = "its vision encoder is not described in keepsight yet"
    tiles: Callable[..., list[int] | None] | None = None
    text_type: int = 0
    tested: str = ""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it sees: "image", and "video" where it takes videos."""
        return tuple(modality for modality, _ in self.visual_tokens)

    def vision_parts(self, config: Any) -> VisionParts:
        """How the vision encoder of a model of this family is built.

        Args:
            config: the model's configuration.

        Raises:
            UnsupportedModelError: if that is not described: there is no VisMem on it.
        """
        if isinstance(self.vision, VisionParts):
            return self.vision
        reason = self.why_no_vismem(config)
        if reason is not None:
            raise UnsupportedModelError(
                f"{self.name} can have a PVM, and no latent memory (VisMem): {reason}. "
                "docs/families.md has the list of what each family can have."
            )
        assert self.vision is not None
        return self.vision[config.vision_config.model_type]

    def why_no_vismem(self, config: Any) -> str | None:
        """Why a model of this family can have no latent memory, as the end of a sentence; None where it can."""
        if self.vision is None:
            return self.no_vismem
        if isinstance(self.vision, VisionParts) or config.vision_config.model_type in self.vision:
            return None
        encoder = config.vision_config.model_type
        return f"its vision encoder is a {encoder}, and of those known are {', '.join(self.vision)}"
