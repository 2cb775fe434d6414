"""The shared table of tests on every further family.

The long tests (training stages, processes, servers) run on the families of tests/families/first.py only.
"""

import re

import pytest
import torch
from families import IMAGE, MORE, TinyFamily, make_inputs
from helpers import LAYERS, MIXED_ROWS, attach, built
from test_cache import (  # noqa: F401
    test_a_static_cache_serves_a_second_request,
    test_assisted_decoding_equals_greedy,
    test_batch_equals_its_rows,
    test_beam_search_equals_uncached_beams,
    test_cached_equals_uncached,
    test_continued_conversation_with_a_second_image,
    test_generated_batch_equals_its_rows,
    test_images_are_projected_once,
    test_interleaved_requests_never_see_each_others_image,
    test_published_rule_cached_equals_uncached,
    test_sampling_several_sequences,
    test_static_cache_equals_dynamic,
)
from test_identity import (  # noqa: F401
    test_base_names_and_weights_stay,
    test_gate_zero_equals_base,
    test_gate_zero_equals_base_in_bfloat16,
    test_off_and_unloaded_equal_base,
    test_only_text_after_an_image_is_updated,
    test_published_rule_also_updates_text_before_the_image,
    test_text_only_call_is_untouched,
)
from test_never_silent import MUTATIONS, RIGHT, results
from test_peft import (  # noqa: F401
    test_merge_is_refused,
    test_save_then_load_equals_before,
    test_transformers_load_adapter_equals_peft,
)
from test_training import (  # noqa: F401
    test_a_batch_without_images_gives_zero_gradients_not_none,
    test_gradient_checkpointing_changes_nothing,
    test_only_the_memory_trains,
)

import keepsight
from keepsight.backbone import Backbone
from keepsight.pvm.branch import PvmBranch


@pytest.fixture(params=MORE, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> TinyFamily:
    return request.param


def test_the_update_is_added_as_it_is(family):
    """No norm stands between the gate and the residual stream, or the gate would not weigh."""
    model, inputs = built(family, layers=LAYERS[:1])
    layer = Backbone.of(model).layers[LAYERS[0]]
    branch = next(module for module in layer.modules() if isinstance(module, PvmBranch))
    states, updates = [], []
    look = branch._look
    branch._look = lambda *args: updates.append(look(*args)) or updates[-1]
    handle = layer.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(**inputs, use_cache=False)
        with model.disable_adapter():
            model(**inputs, use_cache=False)
    handle.remove()
    # Gemma 4 scales the whole stream behind every layer, Granite what its branches add to it.
    scale = getattr(layer, "layer_scalar", getattr(layer, "residual_multiplier", 1.0))
    per_layer = hasattr(layer, "per_layer_projection")  # and adds to it what depends on it
    assert updates[0].abs().max() > 1e-3
    if not per_layer:
        torch.testing.assert_close(states[0] - states[1], scale * updates[0], rtol=1e-4, atol=1e-5)


def test_the_mask_is_where_images_stand(family):
    model = family.build()
    ids = make_inputs(family, model, MIXED_ROWS)["input_ids"]
    assert torch.equal(Backbone.of(model).visual_mask(ids), ids == IMAGE)


#: Those whose targets are named by what the layers of these families have.
ESSENTIAL = ["pixels unseen", "input_ids renamed", "inputs_embeds lost", "mixer without hooks", "vlm without hooks"]


@pytest.mark.parametrize("change", ESSENTIAL)
def test_a_mutation_ends_in_the_right_result_or_in_an_error(family, change):
    mutate, error = MUTATIONS[change]
    model = family.build()
    inputs = make_inputs(family, model, MIXED_ROWS[:1])
    expected = results(attach(family.build()), inputs)
    mutate(model)
    model = attach(model)
    try:
        found = results(model, inputs)
    except ValueError as refusal:
        # Which of our errors it is depends on the release: in 5.17 the omni thinkers have no module around the decoder.
        if error == RIGHT or not (isinstance(refusal, keepsight.KeepsightError) or re.search(error, str(refusal))):
            raise
    else:  # a family may not take the way that was changed: LLaVA-NeXT hands its ids on by position
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-5)


def test_vismem_is_given_or_refused_with_its_reason(family):
    model = family.build()
    row = Backbone.of(model).family
    if row.vision is not None:
        attach_vismem(model)
        return
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(keepsight.UnsupportedModelError, match="can have a PVM, and no latent memory") as error:
        attach_vismem(model)
    assert row.no_vismem in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


def attach_vismem(model):
    from peft import get_peft_model

    return get_peft_model(model, keepsight.VisMemConfig())
