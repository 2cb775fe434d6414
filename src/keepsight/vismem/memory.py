"""What a latent memory is formed from.

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
from keepsight.vismem.vision import Patches


@dataclass
class Sight:
    """What one row sees.

    Attributes:
        visual: last hidden states of the language model at visual positions [M, D] (M may be 0).
        patches: the images' patches as they enter the vision encoder; None without an image, and then there is no
            short-term memory.
        prompt: input embeddings of the prompt [P, D], padding left out: for `long_input="tokens"`.
    """

    visual: torch.Tensor
    patches: Patches | None = None
    prompt: torch.Tensor | None = field(default=None, repr=False)


@dataclass
class Formation:
    """What one memory is formed from: H = [visual states, text states since the last memory].

    Attributes:
        sight: what the row sees.
        text: text states [Z, D], oldest first, the invocation token's included.
        tokens: input embeddings [n, D] of all that came after the prompt, earlier memories included: for
            `long_input="tokens"`.
    """

    sight: Sight
    text: torch.Tensor
    tokens: torch.Tensor | None = field(default=None, repr=False)

    def detach(self) -> Formation:
        """The same as constants, with nothing kept."""

        def constant(states: torch.Tensor | None) -> Any:
            return None if states is None else states.detach()

        patches = None if self.sight.patches is None else self.sight.patches.detach()
        sight = Sight(self.sight.visual.detach(), patches, constant(self.sight.prompt))
        return Formation(sight, self.text.detach(), constant(self.tokens))


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
    """One image, tile or frame as the vision encoder saw it: positions `start` to `stop`, in windows of these sizes.

    Attributes:
        start, stop: positions in the call.
        windows: sizes of its windows; its own size where there are none.
        valid: bool [rows, columns] of its patches, false at padding; None where it has none.
    """

    start: int
    stop: int
    windows: tuple[int, ...]
    valid: torch.Tensor | None = None


def read_sights(
    backbone: Backbone,
    vision_calls: list[dict[str, Any]],
    input_ids: torch.Tensor,
    hidden: torch.Tensor,
    arguments: dict[str, Any],
    copies: int = 1,
    embedded: torch.Tensor | None = None,
) -> list[Sight]:
    """What every row of a prompt sees.

    Args:
        backbone: the model's parts.
        vision_calls: what the hooks saw of the vision encoder while the prompt was read.
        input_ids: the prompt [B, T], with every row repeated `copies` times.
        hidden: the decoder's last hidden states [B, T, D].
        arguments: what `generate` was given besides: pixels and their sizes.
        copies: `num_return_sequences`.
        embedded: the decoder's input embeddings [B, T, D], where memories are formed from them.

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
        _refuse_half_seen(call, backbone)
        tiles = _tiles(call, backbone)
        counts = _told(backbone, input_ids[::copies], arguments, len(tiles), copies)
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
        prompt = None
        if embedded is not None:
            valid = arguments.get("attention_mask")
            prompt = embedded[row].detach() if valid is None else embedded[row][valid[row // copies].bool()].detach()
        sights.append(Sight(hidden[row][visual_mask[row]].detach(), seen, prompt))
    return sights


def _refuse_half_seen(call: dict[str, Any], backbone: Backbone) -> None:
    """Raises KeepsightError if something passed by unseen without which a memory would be formed from other states."""
    vision, lengths = backbone.vision, call["cu_seqlens"]
    lacks = [
        what
        for what, is_missing in (
            ("the patches (a tensor [..., width])", call["x"] is None),
            ("rotary embeddings (a pair of cosines and sines)", vision.rotary is not None and call["rotary"] is None),
            (
                f"the patches' coordinates (integers, at {vision.rotary})",
                vision.rotary is not None and call.get("coordinates") is None,
            ),
            ("the ends of the windows (integers)", not backbone.windowed_vision_blocks <= set(lengths)),
        )
        if is_missing
    ]
    if lacks:
        raise KeepsightError(
            f"The blocks of the vision encoder ({backbone.family.vision_tower}.{vision.blocks}) ran, and not all that "
            f"a memory is formed from was seen on the way: looked for {', and '.join(lacks)} among the arguments. This "
            "release of transformers takes another way than keepsight knows: install one that it was tested with "
            "(docs/compatibility.md), or generate with memory='off'."
        )


def _tiles(call: dict[str, Any], backbone: Backbone) -> list[_Tile]:
    """What one call of the vision encoder saw, in order."""
    lengths, coordinates = call["cu_seqlens"], call.get("coordinates")
    if not lengths and coordinates is None:  # [images, patches, d]
        padding = call.get("padding")
        rows, size = call["x"].shape[:2]
        valid = [None] * rows if padding is None else list(padding)
        sizes = [size if own is None else int(own.sum()) for own in valid]
        return [_Tile(i * size, (i + 1) * size, (sizes[i],), valid[i]) for i in range(rows)]
    windowed = sorted(backbone.windowed_vision_blocks & set(lengths))
    if coordinates is None or lengths:
        full = min(set(lengths) - backbone.windowed_vision_blocks, default=0)
        sizes = lengths[full].diff().tolist()
    else:  # one sequence of images (Pixtral): each begins at its first row and column
        firsts = (coordinates == 0).all(-1).nonzero().flatten()
        sizes = torch.cat([firsts, firsts.new_tensor([len(coordinates)])]).diff().tolist()
    windows = iter(lengths[windowed[0]].diff().tolist() if windowed else sizes)
    tiles, start = [], 0
    for length in sizes:
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
    unread = backbone.unread_positions
    tokens = [(tile.stop - tile.start - unread) // backbone.merge_side**2 for tile in tiles]
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
    x = call["x"].detach().flatten(0, -2)[start:stop]
    rotary = call.get("rotary")
    if rotary is not None:
        rotary = tuple(t.detach()[start:stop] for t in rotary)
    valid = [tile.valid for tile in tiles if tile.valid is not None]
    coordinates = call.get("coordinates")
    if valid:
        x = x[torch.cat([own.flatten() for own in valid])]
        extent = max(int(own.any(1).sum()) for own in valid), max(int(own.any(0).sum()) for own in valid)
    elif coordinates is not None:
        rows, columns = (coordinates[start:stop].amax(0) + 1).tolist()
        extent = rows, columns
    else:
        table = backbone.position_table()
        assert table is not None
        extent = (table.shape[-2], table.shape[-1])
    windows = tuple(t.windows for t in tiles)
    return Patches(x, tuple(map(sum, windows)), sum(windows, ()), rotary, extent)


def _told(
    backbone: Backbone, input_ids: torch.Tensor, arguments: dict[str, Any], found: int, copies: int
) -> list[int] | None:
    """How many tiles each row holds [B], where the number of its visual tokens does not tell."""
    tiles = backbone.family.tiles and backbone.family.tiles(backbone, input_ids, arguments)
    if tiles is None:
        return None
    if found not in (sum(tiles), sum(tiles) * copies):
        raise KeepsightError(
            f"The vision encoder saw {found} tiles; the images' sizes describe {sum(tiles)}. "
            "(A short-term memory of LLaVA's videos is not supported.)"
        )
    return [count for count in tiles for _ in range(copies)]
