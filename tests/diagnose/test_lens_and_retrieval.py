"""The lens against hidden states, the retrieval against the block's own output, and both on every family."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import BY_NAME, Row, TinyFamily, make_inputs
from helpers import attach, generate

from keepsight.diagnose import RetrievalMeter, logit_lens
from keepsight.errors import KeepsightError
from keepsight.pvm import memory_off


def test_lens_equals_hidden_states_through_norm_and_head(family: TinyFamily) -> None:
    model = family.build()
    inputs = make_inputs(family, model, [Row(2, (2, 2), 7)])
    trace = logit_lens(model, inputs, text=4)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
        final = out.logits[0, -5:-1].log_softmax(-1)
        # the last entry is already normalised; the one before the embeddings' is the first layer's output
        for layer, hidden in enumerate(out.hidden_states[1:-1]):
            through = model.lm_head(model.model.language_model.norm(hidden[0, -5:-1])).log_softmax(-1)
            kl = (final.exp() * (final - through)).sum(-1)
            np.testing.assert_allclose(trace.kl[:, layer], kl.numpy(), atol=1e-5)
            assert kl.max() > 1e-5
    np.testing.assert_allclose(trace.kl[:, -1], 0, atol=1e-6)
    assert trace.positions.tolist() == [0, 1, 2, 3]
    assert logit_lens(model, inputs, text=4, every=3).positions.tolist() == [0, 3]


def test_lens_sees_the_memory() -> None:
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    inputs = make_inputs(family, model, [Row(2, (2, 2), 7)])
    plain = logit_lens(model, inputs, 4).kl
    model = attach(model)
    assert np.abs(logit_lens(model, inputs, 4).kl - plain).max() > 1e-3
    with memory_off(model):
        np.testing.assert_array_equal(logit_lens(model, inputs, 4).kl, plain)


def test_settled_is_the_first_layer_of_the_rest() -> None:
    from keepsight.diagnose import LensTrace

    kl = np.array([[3.0, 0.1, 0.0], [3.0, 0.1, 0.9], [0.1, 0.2, 0.0]], np.float32)
    assert LensTrace(kl, np.arange(3)).settled(0.5).tolist() == [1, 3, 0]


def one_head(family: TinyFamily, rows: list[Row]) -> tuple[Any, dict[str, torch.Tensor]]:
    model = family.build()
    inputs = make_inputs(family, model, rows)
    return attach(model, width=16, num_kv_heads=1), inputs


def test_weights_are_what_the_block_attends_with(family: TinyFamily) -> None:
    """With one head, the weights times the values must be the block's attention."""
    model, inputs = one_head(family, [Row(3, (2, 2), 2, (2, 2), 4)])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(module: Any, args: tuple, output: torch.Tensor) -> None:
        seen.append((args[2][0, 0], output[0, -1]))  # values [M, d], attention's output [W]

    blocks = [m for m in model.modules() if type(m).__name__ == "CrossAttention"]
    handles = [block.register_forward_hook(note) for block in blocks]
    with RetrievalMeter(model) as meter, torch.no_grad():
        generate(model, inputs, 3)
    for handle in handles:
        handle.remove()
    trace = meter.trace
    visual = len(trace.layout.slots)
    assert trace.weights.shape == (3, 2, visual)
    assert visual >= 4
    np.testing.assert_allclose(trace.weights.sum(-1), 1, atol=1e-5)
    for step in range(3):
        for row, block in enumerate(blocks):
            values, output = seen[step * 2 + row]
            weights = torch.from_numpy(trace.weights[step, row])
            torch.testing.assert_close(block.o_proj(weights @ values), output, rtol=0, atol=1e-4)
    assert (trace.update > 0).all()


def test_maps_put_weights_on_their_images() -> None:
    family = BY_NAME["qwen3_vl"]
    model, inputs = one_head(family, [Row(1, (1, 3), 2, (2, 2), 1, (3, 1), 4)])
    with RetrievalMeter(model, every=2) as meter:
        generate(model, inputs, 3)
    trace = meter.trace
    assert trace.steps.tolist() == [0, 2]
    maps = trace.maps()
    assert [m.shape for m in maps] == [(2, 2, 1, 1, 3), (2, 2, 1, 2, 2), (2, 2, 1, 3, 1)]
    flat = np.concatenate([m.reshape(2, 2, -1) for m in maps], -1)
    np.testing.assert_array_equal(flat, trace.weights)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_video_frames_have_maps_of_their_own(name: str) -> None:
    from families import END, START, VIDEO

    model = BY_NAME[name].build()
    frames, height, width = 3, 2, 4  # in visual tokens
    grid = torch.tensor([[frames, 2 * height, 2 * width]])
    run = [START, *[VIDEO] * (height * width), END]
    if name == "qwen2_5_vl":  # one run for all frames; the others write each frame apart
        ids = torch.tensor([[9, START, *[VIDEO] * (frames * height * width), END, 10, 11]])
    else:
        ids = torch.tensor([[9, *run, 12, *run, 13, *run, 10, 11]])
    pixels = torch.randn(int(grid.prod()), 96)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }
    model = attach(model, width=16, num_kv_heads=1)
    with RetrievalMeter(model) as meter:
        generate(model, inputs, 2)
    (grid_map,) = meter.trace.maps()
    assert grid_map.shape == (2, 2, frames, height, width)
    np.testing.assert_allclose(grid_map.sum((2, 3, 4)), 1, atol=1e-5)


def test_without_memory_or_image_there_is_a_lesson() -> None:
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    with pytest.raises(KeepsightError, match="carries no PVM"):
        RetrievalMeter(model)
    model = attach(model)
    with RetrievalMeter(model) as meter:
        generate(model, make_inputs(family, model, [Row(4)]), 2)
    with pytest.raises(KeepsightError, match="Nothing was retrieved"):
        _ = meter.trace
