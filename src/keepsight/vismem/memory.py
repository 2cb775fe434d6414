"""What a latent memory is formed from, and what of it is kept between invocations.

`Sight` is what one prompt shows: the visual states of the language model and the patches of the vision encoder. It is
collected once, from what passed by while the model read its prompt, so that the memory sees exactly what the model
saw; copies of a row (`num_return_sequences`) share it. `Invocation` is the record of one memory.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        invoked_as: the type that was asked for; differs from `kind` under policy "reversed".
        position: index of the invocation token in the row's `sequences`; the latents follow it.
        was_sampled: the model asked for it itself (not a policy).
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


@dataclass(frozen=True)
class _Tile:
    """One image, tile or frame as the vision encoder saw it: positions `start` to `stop`, in windows of these sizes."""

    start: int
    stop: int
    windows: tuple[int, ...]


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
        arguments: what `generate` was given besides: pixels and their sizes.
        copies: `num_return_sequences`.

    Raises:
        KeepsightError: if the visual tokens of the prompt do not match what the vision encoder saw.
    """
    visual_mask = backbone.visual_mask(input_ids)
    ran = [call for call in vision_calls if "x" in call]
    if len(ran) < len(vision_calls) or (not ran and not arguments.get("mm_encoder_outputs")):
        if vision_calls or backbone.given_modalities(arguments):
            raise KeepsightError(
                "Images were given, and the blocks of the vision encoder "
                f"({backbone.family.vision_tower}.{backbone.vision.blocks}) did not run as modules: a memory "
                "would be formed without the image."
            )
        visual_mask = torch.zeros_like(visual_mask)  # placeholders without pixels are text
    per_row: list[list[Patches]] = [[] for _ in range(len(input_ids))]
    modalities = list(backbone.family.visual_tokens)
    for call in ran:
        tiles = _tiles(call, backbone)
        counts = _tiles_per_row(backbone, input_ids[::copies], arguments, len(tiles), copies)
        if counts is None:
            counts = _dealt(backbone, tiles, input_ids, modalities, copies)
        # The encoder ran before the rows were repeated (transformers >= 5.20), or after.
        step = copies if sum(counts[::copies]) == len(tiles) else 1
        first = 0
        for row in range(0, len(input_ids), step):
            own = tiles[first : first + counts[row]]
            first += len(own)
            if own:
                patches = _cut(call, own, backbone)
                for copy in range(step):
                    per_row[row + copy].append(patches)
    sights: list[Sight] = []
    for row in range(len(input_ids)):
        if row % copies:
            sights.append(sights[-1])
            continue
        seen = Patches.cat(per_row[row]) if per_row[row] else None
        sights.append(Sight(hidden[row][visual_mask[row]].detach(), seen))
    return sights


def _tiles(call: dict[str, Any], backbone: Backbone) -> list[_Tile]:
    """What one call of the vision encoder saw, in order."""
    if call["x"].ndim == 3:
        rows, positions = call["x"].shape[:2]
        return [_Tile(i * positions, (i + 1) * positions, (positions,)) for i in range(rows)]
    windowed = sorted(backbone.windowed_vision_blocks & set(call["cu_seqlens"]))
    full = min(set(call["cu_seqlens"]) - backbone.windowed_vision_blocks, default=0)
    lengths = call["cu_seqlens"][full].diff().tolist()
    windows = iter(call["cu_seqlens"][windowed[0]].diff().tolist() if windowed else lengths)
    tiles, start = [], 0
    for length in lengths:
        own: list[int] = []
        while sum(own) < length:
            own.append(next(windows))
        tiles.append(_Tile(start, start + length, tuple(own)))
        start += length
    return tiles


def _dealt(
    backbone: Backbone, tiles: list[_Tile], input_ids: torch.Tensor, modalities: list[tuple[str, str]], copies: int
) -> list[int]:
    """How many tiles each row holds [B], by its number of visual tokens; takes the kind of token off `modalities`."""
    drop = int(backbone.vision.class_token)
    tokens = [(tile.stop - tile.start - drop) // backbone.merge_side**2 for tile in tiles]
    for modality in modalities:
        wanted = (input_ids == getattr(backbone.model.config, modality[1])).sum(1).tolist()
        for step in dict.fromkeys((copies, 1)):
            if sum(wanted[::step]) == sum(tokens) and sum(tokens):
                modalities.remove(modality)
                left, counts = iter(tokens), []
                for count in wanted[::step]:
                    taken: list[int] = []
                    while sum(taken) < count:
                        taken.append(next(left))
                    counts += [len(taken)] * step
                return counts
    found = {name: int((input_ids == getattr(backbone.model.config, token)).sum()) for name, token in modalities}
    raise KeepsightError(
        f"The vision encoder made {sum(tokens)} visual tokens; no kind of visual token occurs as often in the "
        f"prompt ({found}). Pass the pixels that belong to input_ids."
    )


def _cut(call: dict[str, Any], tiles: list[_Tile], backbone: Backbone) -> Patches:
    """The patches of one row's tiles, which lie side by side."""
    start, stop = tiles[0].start, tiles[-1].stop
    x = call["x"].detach()
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
    images, windows = tuple(t.stop - t.start for t in tiles), sum((t.windows for t in tiles), ())
    return Patches(x.reshape(-1, x.shape[-1])[start:stop], images, windows, rotary, extent)


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
    given = iter([int(n) for n in per_row])
    if len(per_row) != len(has_images):  # of the rows that have any
        per_row = [next(given, 0) if has else 0 for has in has_images]
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
    return [count for count in result for _ in range(copies)]


def splice_values(latent_mask: torch.Tensor, invocations: Sequence[Sequence[Invocation]], width: int) -> torch.Tensor:
    """The latents of whole sequences, in the order in which their positions occur: [n, D].

    Args:
        latent_mask: bool [B, T], where the sequences hold latents.
        invocations: per row, in order.
        width: D, for sequences without memories.

    Raises:
        KeepsightError: if a row has other memories than its sequence.
    """
    if len(invocations) != len(latent_mask):
        raise KeepsightError(f"invocations of {len(invocations)} rows for {len(latent_mask)} sequences.")
    for row, (own, mask) in enumerate(zip(invocations, latent_mask, strict=True)):
        given, held = sum(len(i.latents) for i in own), int(mask.sum())
        if given != held:
            raise KeepsightError(
                f"Row {row} of the sequences holds the places of {held} latents, and its {len(own)} invocations bring "
                f"{given}. Give all of the sequence's memories, in their order: out.invocations of the output that the "
                "sequences come from."
            )
    latents = [invocation.latents for row in invocations for invocation in row]
    return torch.cat(latents) if latents else torch.zeros(0, width, device=latent_mask.device)
