"""Batches of the warm start: what memories are formed from, and their regression targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from keepsight.backbone import Backbone
from keepsight.vismem import scope
from keepsight.vismem.embeddings import watch_visual_embeddings
from keepsight.vismem.layout import grid_shape
from keepsight.vismem.memory import Formation, Sight, read_sights
from keepsight.vismem.tokens import SHORT


@dataclass
class Moment:
    """A batch at the moment when its memories are formed: only the rows that have an image.

    Attributes:
        rows: rows of the batch, those without an image included.
        formations: what each memory is formed from.
        embeddings: per formation, the visual embeddings [M, D] as they entered the language model.
    """

    rows: int
    formations: list[Formation]
    embeddings: list[torch.Tensor]


@torch.no_grad()
def look(branch: Any, inputs: Mapping[str, Any]) -> Moment:
    """Read a batch with the frozen model, invocation tokens at the ends of its rows, and note what it sees.

    The token of short-term memory stands there for both types: rows are read once. (The tokens' embeddings start
    within a small perturbation of each other, and are not trained here.)
    """
    backbone = branch.backbone
    tokens = branch.tokens
    arguments = _left_padded({k: v for k, v in inputs.items() if k not in ("labels", "position_ids")})
    arguments = _with_token(arguments, tokens.invoke[SHORT], backbone)
    device = branch.weight.device
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    ids, valid = arguments["input_ids"], arguments["attention_mask"].bool()
    with scope.watching() as watch, watch_visual_embeddings(backbone) as seen:
        backbone.vlm(**arguments, use_cache=False)
        hidden = watch.hidden
        assert hidden is not None
        embedded = watch.embedded if branch.config.long_input == "tokens" else None
        sights: list[Sight] = read_sights(backbone, watch.vision_calls, ids, hidden, arguments, embedded=embedded)
    visual = backbone.visual_mask(ids)
    limit = branch.config.max_text_states
    formations, embeddings = [], []
    for row, (sight, own) in enumerate(zip(sights, seen.rows(ids), strict=True)):
        if sight.patches is None or not len(sight.visual):
            continue
        first = int(visual[row].nonzero().max()) + 1
        text = hidden[row, first:][valid[row, first:]]
        tokens = None
        if embedded is not None:  # what stands behind the image is not twice in X
            tokens = embedded[row, first:][valid[row, first:]]
            sight.prompt = embedded[row, :first][valid[row, :first]]
        formations.append(Formation(sight, text if limit is None else text[-limit:], tokens))
        embeddings.append(own)
    return Moment(len(ids), formations, embeddings)


def target(embeddings: torch.Tensor, count: int, sight: Sight, side: int) -> torch.Tensor:
    """What `count` memory tokens regress onto.

    Args:
        embeddings: the row's visual embeddings [M, D].
        count: N.
        sight: where they come from: the size of the image, in patches.
        side: patches per side of one visual token.

    Returns:
        [N, D] in float32: adaptive average pooling over the image's grid where M is one whole image's, else in order.
    """
    wide = embeddings.float()
    patches = sight.patches
    if patches is not None and len(patches.images) == 1:
        height, width = patches.extent[0] // side, patches.extent[1] // side
        if height * width == len(wide):
            shape = grid_shape(count, height, width)
            pooled = F.adaptive_avg_pool2d(wide.T.reshape(1, -1, height, width), shape)
            return pooled[0].flatten(1).T
    return F.adaptive_avg_pool1d(wide.T[None], count)[0].T


def _left_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same rows with all padding on the left, so that they end together."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs | {"attention_mask": torch.ones_like(ids)}
    order = mask.bool().to(torch.uint8).argsort(dim=1, stable=True)
    same = {k for k, v in inputs.items() if torch.is_tensor(v) and v.shape == ids.shape}
    return {k: v.gather(1, order.to(v.device)) if k in same else v for k, v in inputs.items()}


def _with_token(inputs: dict[str, Any], token: int, backbone: Backbone) -> dict[str, Any]:
    """One more column: a token that every row may see."""
    ids = inputs["input_ids"]
    longer = dict(inputs)
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.shape == ids.shape:
            new = token if name == "input_ids" else backbone.value_behind(name)
            longer[name] = torch.cat([value, value.new_full((len(value), 1), new)], 1)
    return longer
