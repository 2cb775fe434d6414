"""Several samples in one row: each retrieves from its own images, in values and gradients, or is refused by name."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import transformers.modeling_flash_attention_utils as utils
from families import BY_NAME, MORE, Row, TinyFamily, make_inputs
from helpers import CLOSE, attach, generate
from packaging.version import Version

import keepsight
from keepsight.pvm.kernels import attention_for
from keepsight.pvm.module import sdpa

ROWS = [Row(2, (2, 2), 4, seed=1), Row(3, (1, 2), 2, (2, 2), 3, seed=2), Row(4, seed=3)]
EVERY = BY_NAME | {family.name: family for family in MORE}
APART = ["qwen3_vl", "qwen2_5_vl", "internvl_qwen2", "internvl_qwen3", "llava_onevision"]


def packed(family: TinyFamily, model: Any, rows: list[Row]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """(inputs of one row that holds the samples of all rows one behind the other, inputs of each alone)."""
    alone = [make_inputs(family, model, [row]) for row in rows]
    for inputs in alone:
        inputs["position_ids"] = positions(model, inputs)
        del inputs["attention_mask"]
    names = dict.fromkeys(name for inputs in alone for name in inputs)
    along = {"input_ids": 1, "position_ids": -1, "mm_token_type_ids": 1}
    together = {n: torch.cat([inputs[n] for inputs in alone if n in inputs], along.get(n, 0)) for n in names}
    return together, alone


def positions(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[1, T], or [4, 1, T] where images lie in three dimensions: the text's own positions first."""
    length = inputs["input_ids"].shape[1]
    text = torch.arange(length)[None]
    if not hasattr(model.model, "get_rope_index"):
        return text
    given = {k: inputs[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw") if k in inputs}
    placed = model.model.get_rope_index(**given)[0] if "image_grid_thw" in inputs else text.expand(3, 1, -1)
    return torch.cat([text[None], placed])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "published"])
@pytest.mark.parametrize("name", APART)
def test_packed_equals_each_alone(name: str, causal: bool) -> None:
    family = BY_NAME[name]
    base = family.build()
    rows = ROWS if name != "llava_onevision" else [ROWS[0], Row(3, (1, 2), 5, seed=2), ROWS[2]]  # cut by sample there
    together, alone = packed(family, base, rows)
    model = attach(base, causal=causal)

    def states(inputs: dict[str, Any]) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits[0]

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        logits.float().log_softmax(-1)[:, 7].sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    apart = torch.cat([states(inputs) for inputs in alone])
    found = states(together)
    torch.testing.assert_close(found, apart, **CLOSE)
    expected = gradients(apart)
    for parameter, gradient in gradients(found).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        assert (states(together) - found).abs().max() > 1e-2  # and the memory matters


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2 on a CPU: its two functions as their documentation has them, behind transformers' own code."""

    def dense(q: Any, k: Any, v: Any, softmax_scale: float | None = None, causal: bool = False, **_: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    def ragged(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, **more: Any
    ) -> Any:
        ends = cu_seqlens_q.tolist()
        assert ends == cu_seqlens_k.tolist()
        return torch.cat([dense(q[None, a:b], k[None, a:b], v[None, a:b], **more)[0] for a, b in pairwise(ends)])

    functions = (dense, ragged, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("name", APART)
def test_packed_under_flash_attention(name: str) -> None:
    """Told apart by positions or by lengths, it equals each alone. A part of the lengths it would not read."""
    family = BY_NAME[name]
    base = family.build()
    rows = ROWS if name != "llava_onevision" else [ROWS[0], Row(3, (1, 2), 5, seed=2), ROWS[2]]
    together, alone = packed(family, base, rows)
    model = attach(base)
    with torch.no_grad():
        apart = torch.cat([model(**inputs, use_cache=False).logits[0] for inputs in alone])
    for module in base.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    unplaced = {key: value for key, value in together.items() if key != "position_ids"}
    with torch.no_grad():
        # transformers before 5.20 hands the text's lengths to Qwen's vision encoder, which has its own: a TypeError
        leaks = family.marks and Version(transformers.__version__) < Version("5.20")
        for inputs in (together,) if leaks else (together, together | told, unplaced | told):
            torch.testing.assert_close(model(**inputs, use_cache=False).logits[0], apart, **CLOSE)
        for some in () if leaks else (["cu_seq_lens_q"], ["cu_seq_lens_q", "cu_seq_lens_k"]):
            with pytest.raises(keepsight.KeepsightError, match="packed into one row, and cu_seq_lens"):
                model(**unplaced, **{key: told[key] for key in some}, use_cache=False)


@pytest.mark.usefixtures("flash")
def test_what_the_branch_gives_flash_attention() -> None:
    """No causal mask, no sample's bounds, its own scale: sdpa's values. What needs a mask goes to sdpa."""
    config = BY_NAME["qwen3_vl"].config().text_config
    config._attn_implementation = "flash_attention_2"
    query, key, value = (torch.randn(2, n, t, 16).bfloat16() for n, t in ((4, 5), (2, 7), (2, 7)))
    kernel = attention_for(config, None)
    assert kernel is not sdpa
    torch.testing.assert_close(kernel(query, key, value, None), sdpa(query, key, value, None))
    assert attention_for(config, torch.ones(2, 1, 5, 7, dtype=torch.bool)) is sdpa


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_cache": True}, "no KV cache is filled"),
        ({"attention_mask": True}, "no attention_mask is given"),
        ({"three": True}, "three-dimensional"),
    ],
)
def test_samples_that_the_decoder_would_mix_are_refused(change: dict[str, Any], reason: str) -> None:
    family = BY_NAME["qwen3_vl"]
    base = family.build()
    together, _ = packed(family, base, ROWS)
    model = attach(base)
    if "attention_mask" in change:
        together["attention_mask"] = torch.ones_like(together["input_ids"])
    if "three" in change:
        together["position_ids"] = together["position_ids"][1:]
    with pytest.raises(keepsight.KeepsightError, match=f"packed into one row, and .*{reason}"), torch.no_grad():
        model(**together, use_cache=change.get("use_cache", False))


@pytest.mark.parametrize("name", EVERY)
def test_no_sample_reads_another_one_whatever_the_decoder_makes_of_positions(name: str) -> None:
    """Flat positions for every family: another first image changes nothing behind it, or the row is refused."""
    family = EVERY[name]
    if name == "molmo2":
        pytest.skip("its patches are numbered through a whole batch, so that images are not put together like this")
    base = family.build()
    first, other, second = (make_inputs(family, base, [Row(3, (2, 2), 4, seed=seed)]) for seed in (1, 3, 2))
    start, length = first["input_ids"].shape[1], second["input_ids"].shape[1]
    flat = {"position_ids": torch.cat([torch.arange(start), torch.arange(length)])[None]}
    mask = {"attention_mask": torch.ones(1, start + length, dtype=torch.long)}
    model = attach(base)

    def behind(one: dict[str, Any], more: dict[str, Any]) -> torch.Tensor:
        row = {n: torch.cat([one[n], second[n]], _dim(family, n)) for n in one if n != "attention_mask"}
        with torch.no_grad():
            return model(**row, **flat, **more).logits[:, start:]

    for attention in ("sdpa", "eager"):
        # The vision encoders of these know one attention only.
        (base.get_decoder() if name in ("fast_vlm", "apertus1p5") else base).set_attn_implementation(attention)
        for more in ({"use_cache": False}, {"use_cache": True}, {"use_cache": False, **mask}):
            try:
                found = behind(first, more)
            except keepsight.KeepsightError as error:
                refused = "packed into one row" in str(error)
                assert refused
            else:
                torch.testing.assert_close(found, behind(other, more), rtol=0, atol=1e-6)


def _dim(family: TinyFamily, name: str) -> int:
    if name == "pixel_values":
        return 1 if family.by_row else family.pixel_dim
    return 1 if family.by_row or name in ("input_ids", "mm_token_type_ids", "token_type_ids") else 0


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_no_packing(name: str, cache: str, attention: str) -> None:
    """Padded rows, whose masks and positions transformers makes, are written as each alone."""
    family = EVERY[name]
    model = family.build()
    model.set_attn_implementation(attention)
    rows = [Row(6, (2, 2), 4, seed=1), Row(1, (2, 2), 3, seed=2)]
    inputs = make_inputs(family, model, rows)
    model = attach(model)
    together = generate(model, inputs, cache_implementation=cache)
    alone = generate(model, make_inputs(family, model, rows[1:]), cache_implementation=cache)
    torch.testing.assert_close(torch.stack(together.logits, 1)[1:], torch.stack(alone.logits, 1), **CLOSE)


def test_linear_attention_is_refused() -> None:
    family = BY_NAME["qwen3_5"]
    base = family.build()
    together, alone = packed(family, base, ROWS)
    model = attach(base)
    with torch.no_grad():
        with pytest.raises(keepsight.KeepsightError, match="linear attention carries its state"):
            model(**together, use_cache=False)
        for inputs in alone:  # one sample is none too many
            model(**inputs, use_cache=False)


def test_lengths_without_positions_are_refused() -> None:
    family = BY_NAME["qwen3_vl"]
    base = family.build()
    inputs = make_inputs(family, base, ROWS[:1])
    model = attach(base)
    with pytest.raises(keepsight.KeepsightError, match="packing=False"):
        model(**inputs, cu_seq_lens_q=torch.tensor([0, 4, inputs["input_ids"].shape[1]]))


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.filterwarnings("ignore:inputs_embeds were given", "ignore:.*brings more of an image")
def test_positions_that_pass_zero_begin_no_sample(name: str, use_cache: bool) -> None:
    """Qwen's models remember by how much positions lag behind an image, and count the next text from there."""
    family = BY_NAME[name]
    model = attach(family.build())
    embeds = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, use_cache=use_cache).logits
        model(**make_inputs(family, model, [Row(2, (4, 4), 3, seed=1)]))
        assert -20 < int(model.get_base_model().model.rope_deltas) < 0
        found = model(inputs_embeds=embeds, use_cache=use_cache).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    mask = torch.arange(20)[None] < 4
    with torch.no_grad(), keepsight.pvm.visual_positions(mask):
        assert (model(inputs_embeds=embeds, use_cache=use_cache).logits - expected).abs().max() > 1e-3
