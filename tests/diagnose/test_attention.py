"""The meter against the attention matrices that eager attention returns, on every family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import BY_NAME, Row, TinyFamily, make_inputs
from helpers import MIXED_ROWS, attach, generate

from keepsight.diagnose.instruments.attention import AttentionMeter
from keepsight.errors import KeepsightError

EAGER_CLOSE = {"rtol": 1e-5, "atol": 1e-5}
N = 5


def reference(family: TinyFamily, inputs: dict[str, torch.Tensor], model: Any, n: int = N) -> dict[str, np.ndarray]:
    """Sums over the true attention matrices, each [S, L, B, H]."""
    layers = [i for i, layer in enumerate(model.model.language_model.layers) if hasattr(layer, "self_attn")]
    out = generate(model, inputs, n, output_attentions=True)
    ids, open_ = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = torch.isin(ids, torch.tensor([model.config.image_token_id]))
    found: dict[str, list[torch.Tensor]] = {"visual": [], "first": []}
    for step in out.attentions:
        weights = torch.stack([w for w in step if w is not None])[:, :, :, -1].transpose(0, 1)  # [B, L, H, K]
        assert weights.shape[1] == len(layers)
        found["visual"].append((weights[..., : ids.shape[1]] * visual[:, None, None]).sum(-1))
        first = open_.int().argmax(1)
        found["first"].append(torch.stack([weights[b, :, :, first[b]] for b in range(len(ids))]))
    return {name: torch.stack(values).permute(0, 2, 1, 3).numpy() for name, values in found.items()}


def with_attention(family: TinyFamily, name: str) -> Any:
    model = family.build()
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_agrees_with_eager_attention_matrices(family: TinyFamily, kernel: str) -> None:
    """Grouped queries, left padding, several images and a row without any, in one batch."""
    eager, model = with_attention(family, "eager"), with_attention(family, kernel)
    inputs = make_inputs(family, model, MIXED_ROWS)
    expected = reference(family, inputs, eager)
    with AttentionMeter(model) as meter:
        generate(model, inputs, N)
    trace = meter.trace
    np.testing.assert_allclose(trace.mass, expected["visual"], **EAGER_CLOSE)
    np.testing.assert_allclose(trace.first_token_mass, expected["first"], **EAGER_CLOSE)
    assert trace.mass.shape == (N, len(meter.layers), 3, 4)
    assert trace.steps.tolist() == list(range(N))
    assert (trace.mass[:, :, 2] == 0).all(), "the third row has no image"
    assert np.isinf(trace.tvr[:, :, 2]).all()
    finite = trace.tvr[:, :, :2]
    np.testing.assert_allclose(finite, 1 / trace.mass[:, :, :2] - 1, rtol=1e-4)
    assert (trace.mass[:, :, :2] > 0).all()


def test_counts_keys(family: TinyFamily) -> None:
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS)
    with AttentionMeter(model) as meter:
        generate(model, inputs, N)
    visual = (inputs["input_ids"] == model.config.image_token_id).sum(1).numpy()
    text = inputs["attention_mask"].sum(1).numpy() - visual
    assert meter.trace.visual_tokens.tolist() == visual.tolist()
    assert meter.trace.text_tokens.tolist() == [(text + t).tolist() for t in range(N)]


def test_generation_is_unchanged_and_the_model_is_put_back(family: TinyFamily) -> None:
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS)
    plain = generate(model, inputs, N)  # transformers itself installs hooks in the first call
    attributes = [dict(vars(module)) for module in model.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    with AttentionMeter(model, every=2) as meter:
        metered = generate(model, inputs, N)
    assert torch.equal(torch.stack(plain.logits), torch.stack(metered.logits))
    assert meter.trace.steps.tolist() == [0, 2, 4]
    for before, module in zip(attributes, model.modules(), strict=True):
        after = vars(module)
        assert before.keys() == after.keys()
        assert before.get("config") is after.get("config")
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_sampled_steps_and_chosen_layers_agree_with_all() -> None:
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS)
    with AttentionMeter(model) as full:
        generate(model, inputs, 9)
    with AttentionMeter(model, layers=[2, 0], every=4) as few:
        generate(model, inputs, 9)
    assert few.trace.layers.tolist() == [2, 0]
    np.testing.assert_array_equal(few.trace.mass, full.trace.mass[::4][:, [2, 0]])


def test_static_cache_and_chunked_prompt_give_the_same_mass() -> None:
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    inputs = make_inputs(family, model, [Row(3, (2, 2), 6)])
    results = []
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with AttentionMeter(model) as meter:
            generate(model, inputs, N, **options)
        results.append(meter.trace.mass)
    np.testing.assert_allclose(results[1], results[0], **EAGER_CLOSE)


def test_edges_of_a_grid() -> None:
    family = BY_NAME["qwen3_vl"]
    model = with_attention(family, "eager")
    inputs = make_inputs(family, model, [Row(2, (3, 4), 3)])
    with AttentionMeter(model) as meter:
        out = generate(model, inputs, 3, output_attentions=True)
    inner = [5, 6]  # of a 3 x 4 grid in reading order
    start = int((inputs["input_ids"][0] == model.config.image_token_id).int().argmax())
    border = [start + i for i in range(12) if i not in inner]
    expected = np.stack([[w[:, :, -1, border].sum(-1).numpy() for w in step] for step in out.attentions])
    np.testing.assert_allclose(meter.trace.edge_mass, expected, **EAGER_CLOSE)
    assert meter.trace.edge_tokens.tolist() == [10]


def test_with_a_memory_attached_and_with_beams() -> None:
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS[:2])
    model = attach(model)
    with AttentionMeter(model, every=2) as meter:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    assert meter.trace.mass.shape[2] == 6
    assert (meter.trace.mass > 0).all()


def test_two_generations_are_two_traces_and_failures_leave_no_trace() -> None:
    family = BY_NAME["qwen2_5_vl"]
    model = family.build()
    inputs = make_inputs(family, model, [Row(3, (2, 2), 6)])
    with AttentionMeter(model) as meter:
        generate(model, inputs, 2)
        generate(model, inputs, 4)
    assert [len(trace.steps) for trace in meter.traces] == [2, 4]

    handle = model.model.language_model.layers[1].mlp.register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError), AttentionMeter(model) as meter:
        generate(model, inputs, 2)
    handle.remove()
    assert all(type(m.config).__name__ != "_Probe" for m in model.modules() if hasattr(m, "config"))
    with pytest.raises(KeepsightError, match="seen no generation"):
        _ = meter.trace


def _fail(module: Any, args: Any) -> None:
    raise ZeroDivisionError


def test_text_only_prompt_has_no_visual_mass() -> None:
    family = BY_NAME["qwen3_vl"]
    model = family.build()
    with AttentionMeter(model) as meter:
        generate(model, make_inputs(family, model, [Row(4)]), 3)
    assert (meter.trace.mass == 0).all()
    assert meter.trace.visual_tokens.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [9]}, "0 to 3"),
        ({"layers": [0]}, "linear attention"),
        ({"layers": "some"}, "'auto'"),
        ({"every": 0}, "1 or more"),
    ],
)
def test_bad_settings_are_lessons(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KeepsightError, match=message):
        AttentionMeter(BY_NAME["qwen3_5"].build(), **options)


def test_the_instruments_need_no_extra() -> None:
    """Neither the lab's nor the trainer's libraries, in a process of its own."""
    code = """
import sys
for name in ("sklearn", "matplotlib", "trl", "datasets", "selenium"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from families import BY_NAME, Row, make_inputs
import keepsight
family = BY_NAME["qwen3_vl"]
model = family.build()
inputs = make_inputs(family, model, [Row(2, (2, 2), 4)])
with keepsight.diagnose.AttentionMeter(model) as meter:
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
print(meter.trace.mass.shape, keepsight.diagnose.logit_lens(model, inputs, 3).kl.shape)
"""
    tests = str(Path(__file__).parents[1])
    out = subprocess.run([sys.executable, "-c", code, tests], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "(3, 4, 1, 4) (3, 4)", out.stderr
