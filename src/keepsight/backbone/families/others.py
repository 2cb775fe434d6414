"""Families that share little with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from keepsight.backbone.parts import IMAGES, Family, VisionParts
from keepsight.backbone.projecting import as_still_images, downsampled, in_a_row, merged
from keepsight.backbone.towers import SIGLIP
from keepsight.errors import KeepsightError


def _unmerged(backbone: Any, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """VideoLLaMA 3 is told, image by image, how many patches become one token: as many as their tokens, or refused."""
    for name in ("image_merge_sizes", "video_merge_sizes"):
        sizes = arguments.get(name)
        if sizes is not None and bool((torch.as_tensor(sizes) != 1).any()):
            raise KeepsightError(
                f"{name} is {torch.as_tensor(sizes).tolist()}: a latent memory (VisMem) takes VideoLLaMA 3's patches "
                "one by one (1), as its processor gives images, and not videos, which it merges. A PVM takes both."
            )


_IDEFICS: dict[str, Any] = {
    "vision_tower": "vision_model",
    "projector": "connector",
    "visual_tokens": IMAGES,
    "merge_side": attrgetter("scale_factor"),
    "vision": replace(SIGLIP, padding="patch_attention_mask"),
}
# GLM marks the frames of a video with the images' token.
_GLM: dict[str, Any] = {
    "vision_tower": "visual",
    "projector": "visual.merger",
    "visual_tokens": (("image", "image_token_id"), ("video", "image_token_id")),
    "merge_side": attrgetter("vision_config.spatial_merge_size"),
    "vision": VisionParts(
        position_table="embeddings.position_embedding.weight", final_norm="post_layernorm", project=downsampled
    ),
}

_GOT: dict[str, Any] = {
    "visual_tokens": IMAGES,
    "no_vismem": "its vision encoder's attention has relative positions, of which a memory's own positions have none",
}

_RESAMPLED = "its projector resamples a whole image into a fixed number of tokens, of which a memory's are none"
_MERGED = "its vision encoder merges patches between its blocks, where a memory's own positions have no place"
_LATENT = "its decoder's attention is latent (MLA), without the projections that the long-term memory adapts"
_MUSE: dict[str, Any] = {
    "projector": "vision_adapter",
    "merge_side": attrgetter("vision_config.merge_size"),
    "no_vismem": "its projector reads the channels of merged patches in an order that is not described yet",
}
_NO_ENCODER = "it has no vision encoder with attention, in which a memory could be formed"
_CONVOLVED = "its vision encoder has convolutions over neighbouring patches, of which a memory has none"
_QUERIES = "its vision encoder ends in queries of a fixed number, read out of a whole image"
#: Images written as words of a visual vocabulary, whose embeddings enter the decoder.
_CODES: dict[str, Any] = {
    "vision_tower": "vqmodel.encoder",
    "projector": "vqmodel",
    "visual_tokens": IMAGES,
    "no_vismem": "its images are words of a vocabulary, and the encoder that chooses them has no attention blocks",
}

ROWS: dict[str, Family] = {
    "idefics3": Family(name="Idefics3", **_IDEFICS),
    "smolvlm": Family(name="SmolVLM", **_IDEFICS),
    "glm4v": Family(name="GLM-4.1V", **_GLM),
    "glm4v_moe": Family(name="GLM-4.5V", **_GLM),
    "glm46v": Family(name="GLM-4.6V", **_GLM),
    "ovis2": Family(
        name="Ovis2",
        projector="visual_embeddings_table",
        visual_tokens=IMAGES,
        no_vismem=(
            "its vision encoder ends in a softmax over visual words, and a memory through it was not the same in "
            "training and in writing"
        ),
    ),
    "kimi_k25": Family(
        name="Kimi-K2.5",
        projector="mm_projector",
        no_vismem=_LATENT,
    ),
    "minicpmv4_6": Family(
        name="MiniCPM-V 4.6",
        projector="merger",
        no_vismem=_MERGED,
    ),
    "minicpm_ocr": Family(name="MiniCPM-OCR", projector="merger", no_vismem=_MERGED),
    "deepseek_vl": Family(
        name="DeepSeek-VL", vision_tower="vision_model", projector="aligner", visual_tokens=IMAGES, vision=SIGLIP
    ),
    "idefics2": Family(
        name="Idefics2",
        vision_tower="vision_model",
        projector="connector",
        visual_tokens=IMAGES,
        no_vismem=_RESAMPLED,
    ),
    "glm_ocr": Family(
        name="GLM-OCR",
        **_GLM
        | {"vision": VisionParts(final_norm="post_layernorm", project=downsampled, head_norms=("q_norm", "k_norm"))},
    ),
    "got_ocr2": Family(name="GOT-OCR 2.0", **_GOT),
    "pp_chart2table": Family(name="PP-Chart2Table", **_GOT),
    "lfm2_vl": Family(
        name="LFM2-VL",
        visual_tokens=IMAGES,
        merge_side=attrgetter("downsample_factor"),
        no_vismem="its vision encoder is given padded images and their shapes, which keepsight does not describe yet",
    ),
    "exaone4_5": Family(
        name="EXAONE 4.5",
        vision_tower="visual",
        projector="visual.merger",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        no_vismem="its vision encoder's heads share keys and values, which a memory's adapter does not know yet",
    ),
    "aria": Family(name="Aria", visual_tokens=IMAGES, no_vismem=_RESAMPLED),
    "janus": Family(
        name="Janus",
        vision_tower="vision_model",
        projector="aligner",
        visual_tokens=IMAGES,
        vision=replace(SIGLIP, output="projection_layer"),
    ),
    "video_llama_3": Family(
        name="VideoLLaMA 3",
        vision_tower="vision_model",
        projector="projector",
        vision=replace(SIGLIP, rotary="rotary_pos_emb", position_table=None, project=in_a_row),
        tiles=_unmerged,
    ),
    "ernie4_5_vl_moe": Family(
        name="ERNIE 4.5 VL",
        projector="resampler_model",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        vision=VisionParts(final_norm="ln", project=as_still_images),
    ),
    "deepseek_vl_hybrid": Family(
        name="DeepSeek-VL (hybrid)",
        vision_tower="vision_model",
        projector="aligner",
        visual_tokens=IMAGES,
        no_vismem="its projector wants the same patches from a second vision encoder, where a memory has no positions",
    ),
    "video_llava": Family(
        name="Video-LLaVA",
        vision_tower="image_tower",
        no_vismem="its images and its videos each have a vision encoder of their own, and a memory is formed in one",
    ),
    "granite_docling": Family(
        name="Granite Docling",
        vision_tower="vision_model",
        projector="vision_model.connector",
        visual_tokens=IMAGES,
        merge_side=attrgetter("vision_config.scale_factor"),
        no_vismem="its projector adds each token's place in a whole image, and a memory's tokens have none",
    ),
    "glmga": Family(name="GLM-GA", **_GLM),
    "hunyuan_vl": Family(
        name="HunYuan-VL",
        projector="vision_tower.patch_merger",
        visual_tokens=IMAGES,
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        no_vismem="its projector writes marks between the rows of whole images, of which a memory's tokens are none",
    ),
    "step3p7": Family(
        name="Step-3.7",
        vision_tower="vision_model",
        visual_tokens=IMAGES,
        no_vismem="its vision encoder ends in convolutions over neighbouring patches, of which a memory has none",
    ),
    "cosmos3_edge": Family(
        name="Cosmos 3 (edge)",
        vision_tower="visual",
        projector="projector",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        vision=replace(SIGLIP, raster=False, project=in_a_row),
    ),
    "muse_glimmer": Family(name="Muse Glimmer", **_MUSE),
    "mistral_large4": Family(
        name="Mistral Large 4",
        visual_tokens=IMAGES,
        merge_side=attrgetter("spatial_merge_size"),
        no_vismem=_LATENT,
    ),
    "muse_spark": Family(name="Muse Spark", **_MUSE),
    "cohere_compass": Family(
        name="Cohere Compass",
        vision_tower="visual",
        projector="visual.merger",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        vision=VisionParts(position_table="pos_embed.weight"),
    ),
    "minimax_m3_vl": Family(
        name="MiniMax M3",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        no_vismem="its vision encoder places patches in time too, where a memory's positions have a row and a column",
    ),
    "dots3_note": Family(
        name="dots3.note",
        projector="vision_tower.merger",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        no_vismem=_LATENT,
    ),
    "paddleocr_vl": Family(
        name="PaddleOCR-VL",
        vision_tower="visual",
        projector="projector",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        vision=replace(
            SIGLIP,
            blocks="vision_model.encoder.layers",
            rotary="vision_model.encoder.rotary_pos_emb",
            position_table="vision_model.embeddings.position_embedding.weight",
            final_norm="vision_model.post_layernorm",
            project=as_still_images,
        ),
    ),
    "fuyu": Family(
        name="Fuyu",
        vision_tower="vision_embed_tokens",
        projector="vision_embed_tokens",
        visual_tokens=IMAGES,
        no_vismem=_NO_ENCODER,
    ),
    "hyperclovax_vision_v2": Family(
        name="HyperCLOVA X (vision 2)",
        vision_tower="vision_model",
        projector="projector",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        vision=VisionParts(project=merged),
    ),
    "lfm3_vl": Family(
        name="LFM3-VL",
        merge_side=attrgetter("vision_config.spatial_merge_size"),
        no_vismem=_CONVOLVED,
    ),
    "emu3": Family(name="Emu3", **_CODES),
    "apertus1p5": Family(name="Apertus 1.5", **_CODES | {"vision_tower": "vision_tokenizer.encoder"}),
    "molmo2": Family(
        name="Molmo2",
        no_vismem="its projector pools patches in groups that its processor chooses, and a memory's are in none",
    ),
    "unlimited_ocr": Family(name="Unlimited-OCR", visual_tokens=IMAGES, no_vismem=_GOT["no_vismem"]),
    "deepseek_ocr2": Family(name="DeepSeek-OCR 2", visual_tokens=IMAGES, no_vismem=_QUERIES),
}
