"""A vision encoder of somebody else's, a projector, a language model: LLaVA and what was built like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch

from keepsight.backbone.parts import IMAGES, Family, VisionParts
from keepsight.backbone.projecting import as_sized_images, shuffled
from keepsight.backbone.towers import CLIP_LAYERS, PIXTRAL, SIGLIP, SIGLIP_LAYERS
from keepsight.errors import KeepsightError

#: What the projector reads: the hidden states of a layer.
_LAYERS = {"clip_vision_model": CLIP_LAYERS, "siglip_vision_model": SIGLIP_LAYERS}


def _views(backbone: Any, sizes: Any) -> list[int]:
    """Into how many tiles LLaVA cuts each image, the whole of it included."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    config = backbone.model.config
    side = config.vision_config.image_size
    return [image_size_to_num_patches(size.tolist(), config.image_grid_pinpoints, side) for size in sizes]


def _onevision_tiles(backbone: Any, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> list[int] | None:
    """Of LLaVA-OneVision: an image that is alone in its row is cut, the images of others are one tile each."""
    sizes = arguments.get("image_sizes")
    if sizes is None:
        return None
    has_images = backbone.visual_mask(input_ids, modalities=("image",)).any(1).tolist()
    per_row = arguments.get("batch_num_images")
    if per_row is None:
        if len(sizes) != sum(has_images):
            raise KeepsightError(
                f"{len(sizes)} images for {sum(has_images)} rows with image tokens: pass batch_num_images, as the "
                "processor returns it, so that the memory knows whose image is whose."
            )
        per_row = [int(has) for has in has_images]
    given = iter([int(n) for n in per_row])
    if len(per_row) != len(has_images):  # of the rows that have any
        per_row = [next(given, 0) if has else 0 for has in has_images]
    views: Iterator[int] = iter(_views(backbone, sizes))
    cut = [[next(views) for _ in range(int(count))] for count in per_row]
    return [row[0] if len(row) == 1 else len(row) for row in cut]


def _next_tiles(backbone: Any, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> list[int] | None:
    """Of LLaVA-NeXT: every image is cut. How many tokens it then is, is asked of the model's own packing."""
    sizes = arguments.get("image_sizes")
    if sizes is None:
        return None
    vision, config = backbone.model.config.vision_config, backbone.model.config
    views, patches = _views(backbone, sizes), (vision.image_size // vision.patch_size) ** 2
    blank = [torch.zeros(count, patches, 1) for count in views]
    strategy = config.vision_feature_select_strategy
    _, lengths = backbone.vlm.pack_image_features(blank, sizes, strategy, image_newline=torch.zeros(1))
    images = iter(zip(lengths.tolist(), views, strict=True))
    tiles = []
    for wanted in backbone.visual_mask(input_ids, modalities=("image",)).sum(1).tolist():
        held = count = 0
        while held < wanted:
            length, own = next(images, (wanted, 0))
            held, count = held + length, count + own
        tiles.append(count)
    return tiles


def _shuffled_side(config: Any) -> int:
    return round(1 / config.downsample_ratio)


_INTERN: dict[str, Any] = {
    "visual_tokens": IMAGES,
    "merge_side": _shuffled_side,
    "vision": VisionParts(
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
        raster=True,
        final_norm="layernorm",
        project=shuffled,
    ),
}

_TIMM = "its vision encoder is one of timm's, with names of its own"

ROWS: dict[str, Family] = {
    "internvl": Family(name="InternVL", **_INTERN),
    "qianfan_ocr": Family(name="Qianfan-OCR", **_INTERN | {"vision": replace(_INTERN["vision"], blocks="layers")}),
    "llava_onevision": Family(
        name="LLaVA-OneVision", vision={"siglip_vision_model": SIGLIP_LAYERS}, tiles=_onevision_tiles
    ),
    "llava": Family(name="LLaVA, Pixtral", visual_tokens=IMAGES, vision=_LAYERS | {"pixtral": PIXTRAL}),
    "llava_next": Family(name="LLaVA-NeXT", visual_tokens=IMAGES, vision=_LAYERS, tiles=_next_tiles),
    "mistral3": Family(
        name="Mistral 3",
        visual_tokens=IMAGES,
        merge_side=attrgetter("spatial_merge_size"),
        vision={"pixtral": replace(PIXTRAL, project=as_sized_images)},
    ),
    "aya_vision": Family(
        name="Aya Vision",
        visual_tokens=IMAGES,
        merge_side=attrgetter("downsample_factor"),
        vision={"siglip_vision_model": SIGLIP_LAYERS},
    ),
    "cohere2_vision": Family(
        name="Command A Vision",
        visual_tokens=IMAGES,
        merge_side=attrgetter("downsample_factor"),
        vision={"siglip_vision_model": SIGLIP},
    ),
    "vipllava": Family(
        name="ViP-LLaVA",
        visual_tokens=IMAGES,
        vision={"clip_vision_model": CLIP_LAYERS},
    ),
    "llava_next_video": Family(name="LLaVA-NeXT-Video", vision=_LAYERS, tiles=_next_tiles),
    "lighton_ocr": Family(
        name="LightOnOCR",
        vision_tower="vision_encoder",
        projector="vision_projection",
        visual_tokens=IMAGES,
        merge_side=attrgetter("spatial_merge_size"),
        vision={"pixtral": replace(PIXTRAL, project=as_sized_images)},
    ),
    "fast_vlm": Family(name="FastVLM", visual_tokens=IMAGES, no_vismem=_TIMM),
    "perception_lm": Family(name="PerceptionLM", no_vismem=_TIMM),
}
