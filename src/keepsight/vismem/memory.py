"""What a latent memory is formed from, and what of it is kept between invocations.

`Sight` is what one prompt shows: the visual states of the language model and the patches of the vision encoder. It is
collected once, from what passed by while the model read its prompt, so that the memory sees exactly what the model
saw; copies of a row (`num_return_sequences`) share it. `Invocation` is the record of one memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from keepsight.backbone import Backbone
from keepsight.errors import KeepsightError
from keepsight.vismem.module import KeysValues
from keepsight.vismem.vision import BlockStates, Patches


@dataclass
class Sight:
    """What one row sees.

    Attributes:
        visual: last hidden states of the language model at visual positions [M, D] (M may be 0).
        patches: the images' patches as they enter the vision encoder; None without an image, and then there is no
            short-term memory.
        query_states: incremental form: keys and values of `visual` in the query builder.
        patch_states: incremental form: keys and values of `patches` under the short-term former's adapter.
        prefix_states: incremental form: keys and values of `visual` under the long-term former's adapter, per layer,
            each [1, H_kv, M, d].
    """

    visual: torch.Tensor
    patches: Patches | None = None
    query_states: list[KeysValues] | None = field(default=None, repr=False)
    patch_states: list[BlockStates | None] | None = field(default=None, repr=False)
    prefix_states: list[tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)


@dataclass
class Formation:
    """What one memory is formed from: H = [visual states, text states since the last memory].

    Attributes:
        sight: what the row sees.
        text: text states [Z, D], oldest first, the invocation token's included.
    """

    sight: Sight
    text: torch.Tensor


@dataclass
class Invocation:
    """One memory in one row of an output.

    Attributes:
        row: index of the row in `sequences`.
        kind: "short" or "long": the memory that was formed.
        invoked_as: the token that was written; differs from `kind` under policy "reversed".
        position: index of the invocation token in the row's `sequences`; the latents follow it.
        was_sampled: the model chose it itself (not a policy).
        latents: [N, D], as spliced in.
        formation: the hidden states it was formed from: `formation.sight.visual`, `formation.text`.
    """

    row: int
    kind: str
    invoked_as: str
    position: int
    was_sampled: bool
    latents: torch.Tensor = field(repr=False)
    formation: Formation = field(repr=False)


def read_sights(
    backbone: Backbone,
    vision_calls: list[dict[str, Any]],
    input_ids: torch.Tensor,
    hidden: torch.Tensor,
    arguments: dict[str, Any],
    copies: int = 1,
) -> list[Sight]:
    """What every row of a prompt sees.

    Args:
        backbone: the model's parts.
        vision_calls: what the hooks saw of the vision encoder while the prompt was read.
        input_ids: the prompt [B, T], with every row repeated `copies` times.
        hidden: the decoder's last hidden states [B, T, D].
        arguments: what `generate` was given besides: pixels' sizes.
        copies: `num_return_sequences`.

    Raises:
        KeepsightError: if the visual tokens of the prompt do not match what the vision encoder saw.
    """
    visual_mask = backbone.visual_mask(input_ids)
    if not vision_calls and not arguments.get("mm_encoder_outputs"):  # placeholders without pixels are text
        visual_mask = torch.zeros_like(visual_mask)
    rows = len(input_ids) // copies
    per_row: list[list[Patches]] = [[] for _ in range(len(input_ids))]
    modalities = list(backbone.family.visual_tokens)
    for call in vision_calls:
        found = _assign(backbone, call, input_ids, modalities, arguments, copies)
        for row, patches in found.items():
            per_row[row].append(patches)
    sights: list[Sight] = []
    for row in range(len(input_ids)):
        if row % copies:
            sights.append(sights[-1])
            continue
        own = Patches.cat(per_row[row]) if per_row[row] else None
        sights.append(Sight(hidden[row][visual_mask[row]].detach(), own))
    assert len(sights) == rows * copies
    return sights


def _assign(
    backbone: Backbone,
    call: dict[str, Any],
    input_ids: torch.Tensor,
    modalities: list[tuple[str, str]],
    arguments: dict[str, Any],
    copies: int,
) -> dict[int, Patches]:
    """Row -> its patches, of one call of the vision encoder."""
    x = call["x"].detach()
    lengths = _lengths(call, backbone)
    windows = _windows(call, backbone, lengths)
    drop = int(backbone.family.vision.class_token)
    tokens = [(n - drop) // backbone.merge_side**2 for n in lengths]
    tiles = _tiles_per_row(backbone, input_ids[::copies], arguments, len(lengths), copies)
    if tiles is None:
        for modality in modalities:
            token = getattr(backbone.model.config, modality[1])
            counts = (input_ids == token).sum(1).tolist()
            # The encoder ran before the rows were repeated (transformers >= 5.20), or after.
            for step in dict.fromkeys((copies, 1)):
                if sum(counts[::step]) == sum(tokens) and sum(tokens):
                    modalities.remove(modality)
                    tiles = [0] * len(input_ids)
                    _consume(tokens, counts, step, tiles)
                    return _cut(call, x, lengths, windows, tiles, step, backbone)
        raise KeepsightError(
            f"The vision encoder made {sum(tokens)} visual tokens; no kind of visual token occurs as often in the "
            f"prompt ({ {m[0]: int((input_ids == getattr(backbone.model.config, m[1])).sum()) for m in modalities} }). "
            "Pass the pixels that belong to input_ids."
        )
    step = copies if sum(tiles) == len(lengths) else 1
    spread = [0] * len(input_ids)
    for index, count in enumerate(tiles):
        for copy in range(copies):
            spread[index * copies + copy] = count
    return _cut(call, x, lengths, windows, spread, step, backbone)


def _consume(tokens: list[int], counts: list[int], step: int, tiles: list[int]) -> None:
    """Deal images out to rows by the number of visual tokens each row holds."""
    index = 0
    for row in range(0, len(counts), step):
        left, start = counts[row], index
        while left > 0:
            left -= tokens[index]
            index += 1
        for copy in range(step):
            tiles[row + copy] = index - start


def _cut(
    call: dict[str, Any],
    x: torch.Tensor,
    lengths: list[int],
    windows: list[int],
    tiles: list[int],
    step: int,
    backbone: Backbone,
) -> dict[int, Patches]:
    x = x.reshape(-1, x.shape[-1])
    result: dict[int, Patches] = {}
    image = window = start = 0
    for row in range(0, len(tiles), step):
        own = lengths[image : image + tiles[row]]
        image += tiles[row]
        if not own:
            continue
        stop, first = start + sum(own), window
        covered = 0
        while covered < sum(own):
            covered += windows[window]
            window += 1
        rotary = call.get("rotary")
        if rotary is not None:
            rotary = tuple(t.detach()[start:stop] for t in rotary)
        coordinates = call.get("coordinates")
        if coordinates is not None:
            extent = tuple((coordinates[start:stop].amax(0) + 1).tolist())
        else:
            table = backbone.position_table()
            assert table is not None
            extent = (table.shape[-2], table.shape[-1])
        patches = Patches(x[start:stop], tuple(own), tuple(windows[first:window]), rotary, extent)
        for copy in range(step):
            result[row + copy] = patches
        start = stop
    return result


def _lengths(call: dict[str, Any], backbone: Backbone) -> list[int]:
    """Positions of each image, tile or frame."""
    if call["x"].ndim == 3:
        return [call["x"].shape[1]] * call["x"].shape[0]
    full = min(set(call["cu_seqlens"]) - backbone.windowed_vision_blocks, default=0)
    return call["cu_seqlens"][full].diff().tolist()


def _windows(call: dict[str, Any], backbone: Backbone, lengths: list[int]) -> list[int]:
    windowed = sorted(backbone.windowed_vision_blocks & set(call.get("cu_seqlens", ())))
    return call["cu_seqlens"][windowed[0]].diff().tolist() if windowed else lengths


def _tiles_per_row(
    backbone: Backbone, input_ids: torch.Tensor, arguments: dict[str, Any], found: int, copies: int
) -> list[int] | None:
    """LLaVA packs the tiles of an image, so that their number does not follow from the number of tokens."""
    sizes = arguments.get("image_sizes")
    pinpoints = getattr(backbone.model.config, "image_grid_pinpoints", None)
    if sizes is None or pinpoints is None:
        return None
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    has_images = backbone.visual_mask(input_ids, modalities=("image",)).any(1).tolist()
    per_row = arguments.get("batch_num_images")
    if per_row is None:
        if len(sizes) != sum(has_images):
            raise KeepsightError(
                f"{len(sizes)} images for {sum(has_images)} rows with image tokens: pass batch_num_images, as the "
                "processor returns it, so that the memory knows whose image is whose."
            )
        per_row = [int(has) for has in has_images]
    per_row = [int(n) for n in per_row]
    side = backbone.model.config.vision_config.image_size
    tiles = [
        image_size_to_num_patches(size.tolist(), pinpoints, side) if count == 1 else 1
        for count, size in zip([n for n in per_row for _ in range(n)], sizes, strict=True)
    ]
    result, index = [], 0
    for count in per_row:
        result.append(sum(tiles[index : index + count]))
        index += count
    if found not in (sum(result), sum(result) * copies):
        raise KeepsightError(
            f"The vision encoder saw {found} tiles; image_sizes and batch_num_images describe {sum(result)}. "
            "(A short-term memory of LLaVA's videos is not supported.)"
        )
    return result


def splice_values(sequences: torch.Tensor, invocations: list[list[Invocation]], width: int) -> torch.Tensor:
    """The latents of whole sequences, in the order in which their positions occur: [n, D].

    Args:
        sequences: ids [B, T].
        invocations: per row, in order.
        width: D, for sequences without memories.
    """
    latents = [invocation.latents for row in invocations for invocation in row]
    assert len(invocations) == len(sequences)
    return torch.cat(latents) if latents else torch.zeros(0, width, device=sequences.device)
