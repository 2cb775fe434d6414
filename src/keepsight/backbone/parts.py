"""What a family's row can say: `Family`, and `VisionParts` for VisMem, which runs the vision encoder's blocks."""

from __future__ import annotations

from dataclasses import dataclass


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
    """What differs between VLM families. Names are attributes of the module that holds the vision encoder.

    Attributes:
        name: what people call the family.
        vision_tower: dotted attribute that holds the vision encoder, which is called as a module.
        projector: dotted attribute of the module that maps vision features into the decoder's width.
        visual_tokens: (modality, config attribute with the id of the placeholder token that its embeddings replace).
        merge_side: dotted config attribute with the number of patches, per side, that one visual token stands for
            (`None`: one patch per visual token).
        merge_side_is_ratio: the attribute holds 1 / side (InternVL's pixel-shuffle ratio).
        vision: how the vision encoder is built, for VisMem; None if VisMem cannot form its short-term memory in it.
        no_vismem: why not, as the end of a sentence; for errors and docs/families.md.
        tested: at which sizes, beyond tiny random models, its memory was run; for docs/families.md.
    """

    name: str
    vision_tower: str
    projector: str
    visual_tokens: tuple[tuple[str, str], ...] = (("image", "image_token_id"), ("video", "video_token_id"))
    merge_side: str | None = None
    merge_side_is_ratio: bool = False
    vision: VisionParts | None = None
    no_vismem: str = "its vision encoder is not described in keepsight yet"
    tested: str = ""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it sees: "image", and "video" where it takes videos."""
        return tuple(modality for modality, _ in self.visual_tokens)
