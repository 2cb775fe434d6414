"""Rows that multiply while text is written: copies of a prompt that was read once, and shadows.

A shadow is what a row would have written without its memories. It branches off at the row's first invocation, chooses
its next token from the same logits, and is written in the same batch from then on: no prompt is read again, nothing is
written again, and no step is added.
"""

from __future__ import annotations

from typing import Any

import torch

from keepsight.compat import find_output_cache


def take_rows(index: torch.Tensor, output: Any, arguments: dict[str, Any]) -> None:
    """Make a batch in the middle of `generate` that of the rows in `index`.

    Args:
        index: [B'], rows of the batch as it is; some several times.
        output: of the model's latest call: its logits and its cache are replaced.
        arguments: the model's next keyword arguments, changed in place.
    """
    rows = len(output.logits)
    index = index.to(output.logits.device)
    output.logits = output.logits[index]
    cache = find_output_cache(output)
    assert cache is not None
    cache.reorder_cache(index)
    for name, value in arguments.items():
        if not torch.is_tensor(value):
            continue
        dim = 1 if name == "position_ids" and value.ndim == 3 else 0
        if value.ndim > dim and value.shape[dim] == rows and name not in PIXELS:
            arguments[name] = value.index_select(dim, index.to(value.device))


#: Read with the prompt, and not again.
PIXELS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes")
