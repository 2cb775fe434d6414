"""A memory that is on and an image that was given end in "read" or in an error, whatever transformers does next.

Each thing that the route depends on is changed, one at a time (`mutation.py`). With its memory off the changed model
computes what the base does; with it on, the right result or an error, never the base's logits.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import mutation
import pytest
import torch
from families import BY_NAME, MORE, Row, TinyFamily, make_inputs
from helpers import CLOSE, attach, batched_continuously, generate, logits
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

import keepsight
from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, find_cache, find_output_cache
from keepsight.pvm import memory_off, visual_positions
from keepsight.pvm.branch import MEMORY

NAMES = ["qwen3_vl", "qwen3_5", "internvl_qwen3", "llava_onevision"]
ROWS = [Row(2, (2, 2), 4, seed=1), Row(3, (2, 2), 4, seed=2)]
LAYER = 1  # carries a block


def layer(model: Any) -> Any:
    return Backbone.of(model).layers[LAYER]


def pixels_in_a_closure(vlm: Any) -> None:
    """The VLM is given something that makes pixels; only the vision encoder sees them."""
    mutation.stand_in(
        vlm,
        lambda given: {n: (lambda v=v: v) if n == "pixel_values" else v for n, v in given.items()},
        lambda given: {n: v() if n == "pixel_values" else v for n, v in given.items()},
    )


def caches_renamed(module: Any) -> None:
    name = next(iter(cache_argument(module, DynamicCache())))
    mutation.renamed(module, name, "kept_states")


def cache_in_another_field(decoder: Any) -> None:
    def result(output: Any) -> Any:
        fields = {"kept" if isinstance(value, Cache) else name: value for name, value in output.items()}
        kind = dataclasses.make_dataclass("Renamed", [(name, object, None) for name in fields], bases=(ModelOutput,))
        return kind(**fields)

    mutation.stand_in(decoder, result=result)


def cache_in_a_box(decoder: Any) -> None:
    def result(output: Any) -> Any:
        return type(output)(**mutation.boxed(dict(output)))

    mutation.stand_in(decoder, mutation.boxed, mutation.unboxed, result)


RIGHT = ""
#: What changes, and how that must end: with the right result, or with an error that says this.
MUTATIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "pixel_values renamed": (lambda m: mutation.renamed(m.model, "pixel_values", "picture"), RIGHT),
    "encoder outputs renamed": (lambda m: mutation.renamed(m.model, "mm_encoder_outputs", "seen"), RIGHT),
    "pixels unseen": (lambda m: pixels_in_a_closure(m.model), RIGHT),
    "input_ids renamed": (lambda m: mutation.renamed(m.model, "input_ids", "tokens"), "looked for input_ids"),
    "inputs_embeds renamed": (lambda m: mutation.renamed(Backbone.of(m).decoder, "inputs_embeds", "states"), RIGHT),
    "inputs_embeds lost": (
        lambda m: mutation.stand_in(
            Backbone.of(m).decoder,
            lambda given: {n: [v] if n == "inputs_embeds" else v for n, v in given.items()},
            lambda given: {n: v[0] if n == "inputs_embeds" else v for n, v in given.items()},
        ),
        "was given no embeddings",
    ),
    "cache argument renamed": (lambda m: caches_renamed(Backbone.of(m).decoder), RIGHT),
    "cache in another field": (lambda m: cache_in_another_field(Backbone.of(m).decoder), RIGHT),
    "output a tuple": (lambda m: mutation.stand_in(Backbone.of(m).decoder, result=lambda o: o.to_tuple()), RIGHT),
    "output lost": (
        lambda m: mutation.stand_in(Backbone.of(m).decoder, result=lambda output: output.last_hidden_state),
        "no KV cache was found",
    ),
    "cache no Cache": (lambda m: cache_in_a_box(Backbone.of(m).decoder), "no KV cache was found"),
    "cache copied": (lambda m: mutation.stand_in(Backbone.of(m).vlm, mutation.copied), "did not see being read"),
    "vlm without hooks": (lambda m: mutation.stand_in(m.model, hooks=False), "not as a part of a call of"),
    "decoder without hooks": (
        lambda m: mutation.stand_in(Backbone.of(m).decoder, hooks=False),
        "was not called as a module",
    ),
    "layer without hooks": (lambda m: mutation.stand_in(layer(m), hooks=False), RIGHT),
    "mixer without hooks": (
        lambda m: mutation.stand_in(Backbone.mixer(layer(m)), hooks=False),
        "layer 1 ran without its visual memory, which never came to the token mixer",
    ),
    "norm without hooks": (
        lambda m: mutation.stand_in(layer(m).post_attention_layernorm, hooks=False),
        "layer 1 ran without its visual memory, which was last seen at the token mixer",
    ),
    "mlp without hooks": (
        lambda m: mutation.stand_in(layer(m).mlp, hooks=False),
        "layer 1 ran without its visual memory, which was last seen at post_attention_layernorm",
    ),
    "layer is not handed our argument": (
        lambda m: mutation.stand_in(layer(m), mutation.without(MEMORY)),
        "never came to the token mixer",
    ),
    "mixer is not handed our argument": (
        lambda m: mutation.stand_in(Backbone.mixer(layer(m)), mutation.without(MEMORY)),
        "never came to the token mixer",
    ),
    "norm by keyword": (
        lambda m: _by_keyword(layer(m).post_attention_layernorm),
        RIGHT,
    ),
}


def _by_keyword(norm: Any) -> None:
    kind: Any = type(norm)
    call = lambda self, x: kind.__call__(self, hidden_states=x)  # noqa: E731
    forward = lambda self, hidden_states: kind.forward(self, hidden_states)  # noqa: E731
    norm.__class__ = type(kind.__name__, (kind,), {"__call__": call, "forward": forward})


def results(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a forward without a cache, of three generated tokens, and of one behind a cache that the model made."""
    steps = generate(model, inputs, n=3).logits
    behind = step(model, prefilled(model, inputs), rows=len(inputs["input_ids"]))
    return torch.cat([logits(model, inputs, use_cache=False)[:, -1:], torch.stack(steps, 1), behind], 1)


@pytest.mark.parametrize("change", MUTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mutation_ends_in_the_right_result_or_in_an_error(name: str, change: str) -> None:
    family = BY_NAME[name]
    mutate, error = MUTATIONS[change]
    model = family.build()
    inputs = make_inputs(family, model, ROWS)
    base, expected = results(family.build(), inputs), results(attach(family.build()), inputs)
    mutate(model)
    model = attach(model)
    with memory_off(model):
        torch.testing.assert_close(results(model, inputs), base, **CLOSE)
    if error == RIGHT:
        torch.testing.assert_close(results(model, inputs), expected, **CLOSE)
    else:
        with pytest.raises(ValueError, match=error):
            results(model, inputs)


def test_the_memory_moves_every_logit_row_of_these_tests() -> None:
    """Or the right result could be the base's."""
    for name in NAMES:
        family = BY_NAME[name]
        inputs = make_inputs(family, family.build(), ROWS)
        apart = (results(family.build(), inputs) - results(attach(family.build()), inputs)).abs().amax(-1)
        assert apart.min() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_is_none_is_an_error_by_default_too(name: str) -> None:
    """`use_cache` is left to the model's configuration, which fills a cache."""
    family = BY_NAME[name]
    model = family.build()
    cache_in_a_box(Backbone.of(model).decoder)
    model = attach(model)
    with pytest.raises(keepsight.KeepsightError, match="no KV cache was found"):
        model(**make_inputs(family, model, ROWS))


@pytest.mark.parametrize("ids", [(119,), ()])
def test_other_placeholder_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch, ids: tuple[int, ...]) -> None:
    model, inputs = built_with("qwen3_vl")
    monkeypatch.setattr(Backbone, "visual_token_ids", lambda *_: ids)
    with pytest.raises(keepsight.KeepsightError, match="no position of it is visual: looked for the token ids"):
        logits(model, inputs)


def test_another_name_of_the_norm_is_an_error_when_attached() -> None:
    model = BY_NAME["qwen3_vl"].build()
    found = layer(model)
    found.norm_2 = found.post_attention_layernorm
    del found.post_attention_layernorm
    with pytest.raises(keepsight.UnsupportedModelError, match="without post_attention_layernorm"):
        attach(model)


def built_with(name: str, rows: list[Row] | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    family: TinyFamily = BY_NAME[name]
    model = family.build()
    return attach(model), make_inputs(family, model, ROWS if rows is None else rows)


# Caches that were filled in another way


def step(model: Any, cache: Any, rows: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.full((rows, 1), 9), **cache_argument(model, cache)).logits


@torch.no_grad()
def prefilled(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    return find_output_cache(model(**inputs, use_cache=True))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_read_with_the_memory_off_is_missed_aloud(name: str) -> None:
    model, inputs = built_with(name)
    with memory_off(model):
        cache = prefilled(model, inputs)
        step(model, copy.deepcopy(cache))
    with pytest.raises(keepsight.KeepsightError, match="read while the visual memory was off"):
        step(model, cache)
    with model.disable_adapter():
        cache = prefilled(model, inputs)
    with pytest.raises(keepsight.KeepsightError, match="read while the visual memory was off"):
        step(model, cache)


def test_text_read_with_the_memory_off_is_not_missed() -> None:
    family = BY_NAME["qwen3_vl"]
    model, _ = built_with("qwen3_vl")
    text = make_inputs(family, model, [Row(6, seed=1), Row(6, seed=2)])
    with memory_off(model):
        cache = prefilled(model, text)
        base = step(model, copy.deepcopy(cache))
    assert torch.equal(step(model, cache), base)


def test_a_cropped_miss_is_forgotten() -> None:
    family = BY_NAME["internvl_qwen2"]
    model = attach(family.build())
    text = make_inputs(family, model, [Row(6, seed=1)])
    image = make_inputs(family, model, [Row((2, 2), 3, seed=2)])
    cache = prefilled(model, text)
    expected = step(model, copy.deepcopy(cache), 1)
    with memory_off(model), torch.no_grad():
        turn = {n: v for n, v in image.items() if n != "attention_mask"}
        model(**turn, **cache_argument(model, cache))
    with pytest.raises(keepsight.KeepsightError, match="at position 6 and behind"):
        step(model, copy.deepcopy(cache), 1)
    cache.crop(6 - int(cache.get_seq_length()))
    torch.testing.assert_close(step(model, cache, 1), expected, **CLOSE)


def test_a_cache_of_another_model_is_refused_and_an_empty_one_is_not() -> None:
    family = BY_NAME["qwen3_vl"]
    model, inputs = built_with("qwen3_vl")
    foreign = prefilled(family.build(), inputs)
    decoder = Backbone.of(model).decoder
    for callee in (model, decoder):  # the decoder by itself is no way around it
        given = cache_argument(callee, copy.deepcopy(foreign))
        with pytest.raises(keepsight.KeepsightError, match=r"DynamicCache.* holds \d+ positions .* did not see being"):
            callee(input_ids=torch.full((2, 1), 9), **given)
    own = DynamicCache(config=model.config.get_text_config())
    for _ in range(2):
        decoder(input_ids=torch.full((2, 1), 9), **cache_argument(decoder, own))
    text = model.config.get_text_config()
    for cache in (DynamicCache(config=text), StaticCache(config=text, max_cache_len=64)):
        with torch.no_grad():
            model(**inputs, **cache_argument(model, cache))
        assert find_cache((cache,)) is cache


def test_a_static_cache_is_as_new_after_a_reset() -> None:
    family = BY_NAME["internvl_qwen2"]
    model, inputs = attach(family.build()), make_inputs(family, family.build(), ROWS)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with memory_off(model):
        generate(model, inputs, **cache_argument(model, cache), disable_compile=True)
    cache.reset()
    again = generate(model, inputs, **cache_argument(model, cache), disable_compile=True).sequences
    assert again.tolist() == generate(model, inputs).sequences.tolist()


def test_continuous_batching_writes_text_and_refuses_images_that_did_not_come() -> None:
    """It takes ids only: a prompt's pixels never come, and its text reads as it does without the memory."""
    family = BY_NAME["llava_onevision"]
    model, inputs = built_with("llava_onevision", [Row(2, (2, 2), 4, seed=1)])
    text = make_inputs(family, model, [Row(6, seed=1)])["input_ids"][0]
    expected = family.build().generate(input_ids=text[None], max_new_tokens=3, do_sample=False)[0, len(text) :]
    batched = batched_continuously(model.get_base_model(), text)
    assert batched == (expected.tolist(), None)
    written, error = batched_continuously(model.get_base_model(), inputs["input_ids"][0])
    assert not written
    assert "no pixels came with them" in str(error)


# Embeddings that already hold the image


def finished(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(inputs with finished embeddings in place of ids and pixels, where the images stand [B, T])."""
    got: dict[str, Any] = {}
    decoder = Backbone.of(model).decoder
    handle = decoder.register_forward_pre_hook(lambda m, a, k: got.update(k), with_kwargs=True)
    with memory_off(model):
        logits(model, inputs, use_cache=False)
    handle.remove()
    mask = inputs["input_ids"] == model.config.image_token_id
    return {"inputs_embeds": got["inputs_embeds"].detach(), "attention_mask": inputs["attention_mask"]}, mask


@pytest.mark.parametrize("name", ["internvl_qwen3", "llava_onevision", "internvl_qwen2"])
def test_finished_embeddings_with_their_positions_equal_pixels(name: str) -> None:
    model, inputs = built_with(name)
    embeds, mask = finished(model, inputs)
    with visual_positions(mask):
        torch.testing.assert_close(logits(model, embeds), logits(model, inputs), **CLOSE)
        found = generate(model, embeds, n=4)
    expected = generate(model, inputs, n=4)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    with visual_positions(mask):
        beams = generate(model, embeds, n=4, num_beams=2, output_logits=False).sequences
    whole = generate(model, inputs, n=4, num_beams=2, output_logits=False).sequences
    assert beams.tolist() == whole[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_finished_embeddings_without_positions_warn(name: str) -> None:
    model, inputs = built_with(name)
    embeds, mask = finished(model, inputs)
    for call in (logits, generate):
        with pytest.warns(keepsight.KeepsightWarning, match=r"inputs_embeds were given.*visual_positions"):
            call(model, embeds)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        with memory_off(model):
            base = generate(model, embeds)
        with visual_positions(torch.zeros_like(mask)):  # there is no image, says the caller
            assert generate(model, embeds).sequences.tolist() == base.sequences.tolist()
        generate(model, inputs)


def test_positions_that_do_not_fit_or_are_not_used_are_told() -> None:
    model, inputs = built_with("internvl_qwen3")
    embeds, mask = finished(model, inputs)
    with pytest.raises(keepsight.KeepsightError, match="must cover the whole prompt"), visual_positions(mask[:, 1:]):
        logits(model, embeds)
    with pytest.raises(keepsight.KeepsightError, match="expected a bool mask"), visual_positions(mask.long()):
        pass
    with pytest.warns(keepsight.KeepsightWarning, match="used by no call"), visual_positions(mask):
        logits(model, inputs)


def decoded(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, Any]]:
    """(what makes logits of a call of the decoder by itself, the arguments that the VLM calls it with)."""
    got: dict[str, Any] = {}
    decoder, head = Backbone.of(model).decoder, model.get_output_embeddings()
    handle = decoder.register_forward_pre_hook(lambda m, a, k: got.update(k), with_kwargs=True)
    with memory_off(model):
        logits(model, inputs, use_cache=False)
    handle.remove()
    call = torch.no_grad()(lambda **given: head(decoder(**given, use_cache=False).last_hidden_state))
    return call, {n: v for n, v in got.items() if n != "use_cache" and not isinstance(v, Cache)}


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_by_itself_reads_finished_embeddings_or_warns(name: str) -> None:
    model, inputs = built_with(name)
    call, given = decoded(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        call(input_ids=inputs["input_ids"])  # text
        with visual_positions(inputs["input_ids"] == model.config.image_token_id):
            found = call(**given)
        with memory_off(model):
            call(**given)
    torch.testing.assert_close(found, logits(model, inputs, use_cache=False), **CLOSE)
    with pytest.warns(keepsight.KeepsightWarning, match=r"inputs_embeds were given.*visual_positions"):
        call(**given)


#: What a family's decoder is given of an image beside embeddings; with it, where the model takes it, all is right.
BESIDE = {
    "qwen3_vl": (["three dimensions", "deepstack_visual_embeds"], False),
    "qwen2_5_vl": (["three dimensions"], True),
    "qwen3_5": (["three dimensions"], True),
    "glm4v": (["three dimensions"], True),
    "gemma3": (["token_type_ids"], True),
}


@pytest.mark.parametrize("name", BESIDE)
def test_embeddings_are_not_all_of_an_image(name: str) -> None:
    lacking, can_be_given = BESIDE[name]
    family = next(row for row in [*BY_NAME.values(), *MORE] if row.name == name)
    model, inputs = attach(family.build()), make_inputs(family, family.build(), ROWS)
    twin = attach(family.build())  # Qwen's models remember the places of the last image
    _, given = decoded(twin, inputs)
    embeds = {n: given[n] for n in ("inputs_embeds",)} | {"attention_mask": inputs["attention_mask"]}
    mask = inputs["input_ids"] == model.config.image_token_id
    with visual_positions(mask), pytest.warns(keepsight.KeepsightWarning, match="from pixels") as caught:
        logits(model, embeds, use_cache=False)
    assert all(words in str(caught[0].message) for words in lacking)
    with visual_positions(torch.zeros_like(mask)), warnings.catch_warnings():
        warnings.simplefilter("error", keepsight.KeepsightWarning)
        logits(model, embeds, use_cache=False)
    if can_be_given:
        more = {n: inputs[n] for n in ("token_type_ids",) if n in inputs}
        more |= {n: given[n] for n in ("position_ids",) if given.get(n) is not None and not more}
        with visual_positions(mask), warnings.catch_warnings():
            warnings.simplefilter("error", keepsight.KeepsightWarning)
            found = logits(model, embeds | more, use_cache=False)
        torch.testing.assert_close(found, logits(twin, inputs, use_cache=False), **CLOSE)


# Compiled


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("name", ["internvl_qwen3", "qwen3_5"])
def test_a_compiled_model_reads_pixels(name: str, part: str) -> None:
    model, inputs = built_with(name)
    eager = logits(model, inputs)
    torch._dynamo.reset()
    if part == "decoder":
        Backbone.of(model).decoder.compile(backend="eager")
    found = logits(torch.compile(model, backend="eager") if part == "model" else model, inputs)
    torch.testing.assert_close(found, eager, **CLOSE)


def test_a_compiled_model_reads_finished_embeddings_or_warns() -> None:
    model, inputs = built_with("internvl_qwen3")
    embeds, mask = finished(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):  # and when it is compiled
        with pytest.warns(keepsight.KeepsightWarning, match=r"inputs_embeds were given.*visual_positions"):
            logits(compiled, embeds)
        with visual_positions(mask):
            torch.testing.assert_close(logits(compiled, embeds), logits(model, inputs), **CLOSE)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="keepsight reads images, and looks for them in inputs_embeds, outside"):
        logits(torch.compile(model.get_base_model(), backend="eager", fullgraph=True), embeds)
