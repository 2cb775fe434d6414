"""Whatever the route depends on and does not find ends in an error, never in text without memory.

Each mutation takes one thing away from a model that carries a VisMem: a module is called past its hooks, or a value is
not where it was. What a release of transformers renames or moves looks like that from here.
"""

import copy
from collections import OrderedDict

import mutation
import pytest
import torch
from families import Row
from helpers import batched_continuously
from transformers import Cache, GenerationConfig
from vismem_helpers import BY_NAME, attach, built, forced, generate

import keepsight
from keepsight.backbone import Backbone
from keepsight.vismem import VisMemBranch, VisMemOutput, scope
from keepsight.vismem.writing.checks import refuse_mode


def without_hooks(module):
    """The same module, called past every hook."""
    twin = copy.copy(module)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        twin.__dict__[name] = OrderedDict()
        twin.__dict__[f"{name}_with_kwargs"] = OrderedDict()
    return twin


def replace(model, module):
    """Put the twin in the module's place."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = without_hooks(module)


def embedding(base, backbone):
    twin = without_hooks(base.get_input_embeddings())
    for module in (backbone.vlm, backbone.decoder, base):
        module.get_input_embeddings = lambda: twin
    replace(base, backbone.decoder.embed_tokens)


def head(base, backbone):
    replace(base, base.get_output_embeddings())


def decoder(base, backbone):
    replace(base, backbone.decoder)


def vision_blocks(base, backbone):
    for block in list(backbone.vision_blocks):
        replace(base, block)


def projection(base, backbone):
    replace(base, backbone.layers[2].self_attn.v_proj)


def cache_field(base, backbone):
    def strip(module, args, output):
        values = {k: None if isinstance(v, Cache) else v for k, v in output.__dict__.items()}
        return type(output)(**{k: v for k, v in values.items() if v is not None})

    base.register_forward_hook(strip)


MUTATIONS = [embedding, head, decoder, vision_blocks, projection, cache_field]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_broken_route_is_an_error(name, mutation):
    model, inputs = built(name, [Row(1, (2, 2), 5, seed=2)])
    branch = VisMemBranch.of(model)
    plan = forced([{2: "short", 5: "long"}])
    assert len(generate(model, inputs, memory=plan).invocations[0]) == 2
    mutation(model.get_base_model(), branch.backbone)
    # Where the projector reads the states of a layer, most releases collect them by hooks on the blocks: the base's own
    # IndexError comes before ours.
    base_fails = hasattr(branch.backbone.model.config, "vision_feature_layer") and not name.startswith("internvl")
    base_fails = base_fails and mutation is vision_blocks
    with pytest.raises((IndexError, keepsight.KeepsightError) if base_fails else keepsight.KeepsightError):
        generate(model, inputs, memory=plan)
    assert not scope.is_base_only()


def test_a_model_without_a_head_is_told_so():
    with pytest.raises(keepsight.UnsupportedModelError, match="has no head"):
        attach(BY_NAME["qwen3_vl"].build().model)


def test_a_forward_in_training_is_seen_to_as_well():
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    labels = inputs["input_ids"]
    model(**inputs, labels=labels).loss.backward()
    head(model.get_base_model(), VisMemBranch.of(model).backbone)
    with pytest.raises(keepsight.KeepsightError, match="past the model's head"):
        model(**inputs, labels=labels)
    with model.disable_adapter():
        model(**inputs, labels=labels)


def test_loops_that_form_no_memory_are_refused(monkeypatch):
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    written, error = batched_continuously(model.get_base_model(), inputs["input_ids"][0])
    assert not written
    assert "forms no latent memories" in str(error)
    # A way of transformers' that nobody here knows: not through the loop that it is given, or through another one.
    kind = type(model.get_base_model())
    monkeypatch.setattr(kind, "generate", lambda model, **given: given["input_ids"])
    with pytest.raises(keepsight.KeepsightError, match="went another way than the loop"):
        generate(model, inputs)
    with pytest.raises(keepsight.KeepsightError, match="ask for group beam search"):
        refuse_mode(GenerationConfig(num_beams=4, num_beam_groups=2))


def test_the_output_is_a_generation_output_of_this_release():
    """By key, by place, as a mapping and as a tree of tensors, it is what transformers itself returns, and more."""
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    with model.disable_adapter():
        base = generate(model, inputs, output_scores=True)
    out = generate(model, inputs, output_scores=True, memory=forced([{2: "long"}]))
    assert isinstance(out, type(base))
    assert isinstance(out, VisMemOutput)
    assert list(out.keys())[: len(base.keys())] == list(base.keys())
    assert [name for name in out if name in base] == list(base)
    assert torch.equal(out["sequences"], out.sequences)
    assert out[0] is out.sequences
    assert out.to_tuple()[0] is out.sequences
    assert isinstance(next(v for v in out.values() if isinstance(v, Cache)), Cache)
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(again.sequences, out.sequences)
    assert again.invocations[0][0].kind == "long"
    assert torch.equal(copy.copy(out).sequences, out.sequences)
    plain = generate(model, inputs, memory="off", output_scores=True)
    assert type(plain) is type(base)


def by_keyword(module):
    """Called with its one tensor under a name."""
    kind = type(module)
    call = lambda self, x: kind.__call__(self, tensor=x)  # noqa: E731
    forward = lambda self, tensor: kind.forward(self, tensor)  # noqa: E731
    module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "forward": forward})


def of_blocks(old):
    return lambda base, backbone: [mutation.renamed(block, old, f"other_{old}") for block in backbone.vision_blocks]


def rotary_unseen(base, backbone):
    mutation.stand_in(getattr(backbone.vision_tower, backbone.vision.rotary), hooks=False)


RIGHT = ""
NAMED_OTHERWISE = {
    "embedding by keyword": (lambda base, backbone: by_keyword(base.get_input_embeddings()), RIGHT),
    "head by keyword": (lambda base, backbone: by_keyword(base.get_output_embeddings()), RIGHT),
    "block's states": (of_blocks("hidden_states"), RIGHT),
    "block's angles": (of_blocks("position_embeddings"), RIGHT),
    "block's sequences": (of_blocks("cu_seqlens"), RIGHT),
    "rotary unseen": (rotary_unseen, "looked for the patches' coordinates"),
}


@pytest.mark.parametrize("change", NAMED_OTHERWISE)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "glm4v"])
def test_what_is_named_otherwise_is_found_or_missed_aloud(family, change):
    """An image larger than a window: angles, coordinates and windows all count for what a memory is formed from."""
    mutate, error = NAMED_OTHERWISE[change]
    rows, plan = [Row(3, (5, 6), 2, seed=1)], forced([{2: "short"}])
    model, inputs = built(family, rows)
    expected = generate(model, inputs, memory=plan)
    base = BY_NAME[family].build()
    mutate(base, Backbone.of(base))
    changed = attach(base)
    if error:
        with pytest.raises(keepsight.KeepsightError, match=error):
            generate(changed, inputs, memory=plan)
        return
    out = generate(changed, inputs, memory=plan)
    torch.testing.assert_close(out.invocations[0][0].latents, expected.invocations[0][0].latents)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits))
