"""The attention meter measures what it did before, or ends in an error, whatever transformers does next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mutation
import numpy as np
import pytest
from families import BY_NAME, Row, make_inputs
from helpers import generate
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import keepsight
from keepsight.backbone import Backbone
from keepsight.compat import cache_argument
from keepsight.diagnose.instruments.attention import AttentionMeter

NAMES = ["qwen3_vl", "internvl_qwen3"]
RIGHT = ""


def mixers(model: Any) -> list[Any]:
    return [Backbone.mixer(layer) for layer in Backbone.of(model).layers]


def attends_by_itself(mixer: Any) -> None:
    """The attention looks no function up: its configuration is not asked."""
    config, kind = mixer.config, type(mixer)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        meter, self.config = self.config, config
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            self.config = meter

    mixer.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def caches_renamed(model: Any) -> None:
    decoder = Backbone.of(model).decoder
    mutation.renamed(decoder, next(iter(cache_argument(decoder, DynamicCache()))), "kept_states")


def cache_in_a_box(model: Any) -> None:
    def result(output: Any) -> Any:
        return type(output)(**{n: mutation.Box(v) if isinstance(v, Cache) else v for n, v in output.items()})

    mutation.stand_in(Backbone.of(model).decoder, mutation.boxed, mutation.unboxed, result)


def mask_by_keyword(mixer: Any) -> None:
    """The attention function gets its mask as a keyword argument, as vision encoders give it."""
    config, kind = mixer.config, type(mixer)
    whole = ALL_ATTENTION_FUNCTIONS.get_interface

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = whole(self.config._attn_implementation, None)

        def named(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
            return function(module, query, key, value, attention_mask=mask, **more)

        ALL_ATTENTION_FUNCTIONS.get_interface = lambda *_: named
        try:
            return kind.forward(self, *args, **kwargs)
        finally:
            del ALL_ATTENTION_FUNCTIONS.get_interface

    assert config._attn_implementation == "sdpa"
    mixer.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


MUTATIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "pixel_values renamed": (lambda m: mutation.renamed(m.model, "pixel_values", "picture"), RIGHT),
    "encoder outputs renamed": (lambda m: mutation.renamed(m.model, "mm_encoder_outputs", "seen"), RIGHT),
    "input_ids renamed": (lambda m: mutation.renamed(m.model, "input_ids", "tokens"), "looked for input_ids"),
    "inputs_embeds renamed": (lambda m: mutation.renamed(Backbone.of(m).decoder, "inputs_embeds", "states"), RIGHT),
    "cache argument renamed": (caches_renamed, RIGHT),
    "cache no Cache": (cache_in_a_box, "the meter finds no KV cache"),
    "vlm without hooks": (lambda m: mutation.stand_in(m.model, hooks=False), "not as a part of a call"),
    "decoder without hooks": (lambda m: mutation.stand_in(Backbone.of(m).decoder, hooks=False), "seen no generation"),
    "mixers without hooks": (lambda m: [mutation.stand_in(mixer, hooks=False) for mixer in mixers(m)], RIGHT),
    "mask by keyword": (lambda m: [mask_by_keyword(mixer) for mixer in mixers(m)], RIGHT),
    "no attention asks": (
        lambda m: [attends_by_itself(mixer) for mixer in mixers(m)],
        r"layers \[0, 1, 2, 3\] did not",
    ),
    "one attention does not ask": (lambda m: attends_by_itself(mixers(m)[2]), r"layers \[2\] did not ask"),
}


def mass(model: Any, inputs: Any) -> np.ndarray:
    with AttentionMeter(model) as meter:
        generate(model, inputs, 3)
    return meter.trace.mass


@pytest.mark.parametrize("change", MUTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mutation_ends_in_the_right_mass_or_in_an_error(name: str, change: str) -> None:
    family = BY_NAME[name]
    mutate, error = MUTATIONS[change]
    model = family.build()
    inputs = make_inputs(family, model, [Row(2, (2, 2), 4, seed=1), Row(3, (2, 2), 4, seed=2)])
    expected = mass(family.build(), inputs)
    assert (expected > 0).all()
    before = generate(model, inputs, 3).sequences
    mutate(model)
    assert generate(model, inputs, 3).sequences.tolist() == before.tolist()
    if error == RIGHT:
        np.testing.assert_allclose(mass(model, inputs), expected, rtol=1e-5, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=error):
            mass(model, inputs)
    assert generate(model, inputs, 3).sequences.tolist() == before.tolist()


def test_other_placeholder_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    family = BY_NAME["internvl_qwen3"]
    model = family.build()
    inputs = make_inputs(family, model, [Row(2, (2, 2), 4, seed=1)])
    monkeypatch.setattr(Backbone, "visual_token_ids", lambda *_: (119,))
    with pytest.raises(ValueError, match="no position of it is visual"):
        mass(model, inputs)


@pytest.mark.parametrize("layers", [None, "auto"])
def test_a_model_without_softmax_attention_is_an_error(layers: Any) -> None:
    model = BY_NAME["qwen3_5"].build()
    decoder = Backbone.of(model).decoder
    decoder.layers = decoder.layers[:1]
    assert not Backbone.has_softmax_attention(decoder.layers[0])
    with pytest.raises(keepsight.UnsupportedModelError, match=r"None of this .* has softmax attention"):
        AttentionMeter(model, layers=layers)
