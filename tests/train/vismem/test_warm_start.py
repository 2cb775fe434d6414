"""The warm start: memories move towards the images' visual embeddings, and nothing else moves."""

import pytest
import torch
from families import Row, make_inputs
from helpers import with_continuation
from vismem_helpers import BY_NAME, SIZES, attach, forced, generate

from keepsight import VisMemConfig
from keepsight.errors import KeepsightError
from keepsight.train.vismem.moments import Moment, look, target
from keepsight.train.vismem.warm_start import distill
from keepsight.vismem import VisMemBranch
from keepsight.vismem.embeddings import watch_visual_embeddings
from keepsight.vismem.memory import Sight
from keepsight.vismem.vision import Patches

NAMES = ("qwen2_5_vl", "qwen3_vl", "internvl_qwen3", "llava_onevision", "gemma3", "mistral3", "llava_next")
ROWS = [Row(3, (2, 2), 2, seed=1), Row(1, (2, 2), 5, seed=2), Row(7, seed=3)]


def fresh(name, rows=ROWS, **config):
    """(model with an untrained VisMem, inputs)."""
    from peft import get_peft_model

    family = BY_NAME[name]
    model = family.build()
    inputs = make_inputs(family, model, rows)
    torch.manual_seed(5)
    return get_peft_model(model, VisMemConfig(**(SIZES | config))), inputs


@pytest.mark.parametrize("name", NAMES)
def test_error_falls_and_only_memory_tensors_change(name):
    model, inputs = fresh(name, short_dropout=0.0, long_dropout=0.0)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    seen = []
    report = distill(model, [inputs], steps=25, lr=1e-2, on_log=lambda step, values: seen.append(values))
    assert model.training
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert len(seen) == report.steps == 25
    assert report.rows_without_image == 25
    for kind in ("short", "long"):
        assert seen[0][kind] == report.first[kind]
        assert report.last[kind] < 0.9 * report.first[kind]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("vismem_memory" in n and ".rows." not in n for n in changed)
    assert {"builder", "short_bank", "long_bank", "to_vision", "short_slots", "long_slots"} <= {
        n.partition("default.")[2].partition(".")[0] for n in changed
    }


def test_one_type_leaves_the_other_alone():
    model, inputs = fresh("qwen3_vl")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = distill(model, [inputs], steps=2, kinds=("long",))
    changed = {n.partition("default.")[2] for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert set(report.first) == {"long"}
    assert changed
    assert not any(n.startswith(("short_", "to_vision")) for n in changed)


@pytest.mark.parametrize(("name", "kind"), [*((name, "short") for name in NAMES), ("qwen3_vl", "long")])
def test_memories_are_formed_from_what_generation_forms_them_from(name, kind):
    family = BY_NAME[name]
    model = family.build()
    # Without a cap X of the token sequence is the same wherever the prompt is said to end.
    model = attach(model, max_text_states=3) if kind == "short" else attach(model, long_input="tokens")
    inputs = make_inputs(family, model, ROWS[:1])
    out = generate(model, inputs, n=16, memory=forced([{4: kind}]))
    [[invocation]] = out.invocations
    prompt = inputs["input_ids"].shape[1]
    text = with_continuation(inputs, out.sequences[:, prompt : invocation.position])
    moment = look(VisMemBranch.of(model), text)
    if kind == "long":  # the warm start writes the token of short-term memory for both types
        own = moment.formations[0]
        sequences = [torch.cat([f.sight.prompt, f.tokens])[:-1] for f in (own, invocation.formation)]
        torch.testing.assert_close(*sequences, rtol=0, atol=3e-5)
        assert torch.isfinite(VisMemBranch.of(model).formers().form("long", [own])).all()
        return
    torch.testing.assert_close(moment.formations[0].text, invocation.formation.text, rtol=0, atol=3e-5)
    torch.testing.assert_close(moment.formations[0].sight.visual, invocation.formation.sight.visual, rtol=0, atol=3e-5)
    formed = VisMemBranch.of(model).formers().form("short", moment.formations)[0]
    torch.testing.assert_close(formed, invocation.latents, rtol=0, atol=1e-4)


def test_targets_are_what_the_projector_made_of_the_image():
    model, inputs = fresh("qwen3_vl")
    backbone = VisMemBranch.of(model).backbone
    with torch.no_grad(), watch_visual_embeddings(backbone) as seen:
        model(**inputs)
    images = backbone.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    rows = seen.rows(inputs["input_ids"])
    assert [len(row) for row in rows] == [4, 4, 0]
    for row, image in zip(rows, images, strict=False):
        torch.testing.assert_close(row, image.detach(), rtol=0, atol=1e-6)


def test_padding_on_either_side_is_the_same():
    model, inputs = fresh("qwen3_vl")
    right = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        kept = inputs["attention_mask"].bool()
        right[name] = torch.stack([torch.cat([r[k], r[~k]]) for r, k in zip(inputs[name], kept, strict=True)])
    branch = VisMemBranch.of(model)
    one, other = look(branch, inputs), look(branch, right)
    assert isinstance(one, Moment)
    assert len(one.formations) == len(other.formations) == 2
    for a, b in zip(one.formations, other.formations, strict=True):
        torch.testing.assert_close(a.text, b.text, rtol=0, atol=2e-5)
    assert len(one.formations[0].text) == 1 + 2 + 1  # end of the image, two words, the invocation token
    branch.config.max_text_states = 2
    assert len(look(branch, inputs).formations[1].text) == 2


def sight(height, width, images=1):
    patches = Patches(torch.zeros(1, 1), (4 * height * width // images,) * images, (), None, (2 * height, 2 * width))
    return Sight(torch.zeros(0, 1), patches)


def test_more_embeddings_than_memories_are_pooled_over_the_grid():
    cells = torch.arange(24.0).view(4, 6)
    embeddings = torch.stack([cells.flatten(), cells.flatten() ** 2], -1)  # [24, 2]
    pooled = target(embeddings, 6, sight(4, 6), side=2)  # 2 rows of 3 blocks of 2 x 2
    blocks = cells.view(2, 2, 3, 2).permute(0, 2, 1, 3).reshape(6, 4)
    torch.testing.assert_close(pooled, torch.stack([blocks.mean(1), blocks.square().mean(1)], -1))
    assert torch.equal(target(embeddings, 24, sight(4, 6), side=2), embeddings)
    # Two images: no common grid, so in order.
    in_order = target(embeddings, 6, sight(2, 6, images=2), side=2)
    torch.testing.assert_close(in_order, embeddings.view(6, 4, 2).mean(1))


def test_fewer_embeddings_than_memories_are_repeated():
    embeddings = torch.eye(4)
    repeated = target(embeddings, 16, sight(2, 2), side=2)
    assert repeated.shape == (16, 4)
    assert torch.equal(repeated.view(2, 2, 2, 2, 4)[:, 0, :, 0].reshape(4, 4), embeddings)
    assert torch.equal(repeated.sum(0), torch.full((4,), 4.0))


def test_what_cannot_work_is_refused():
    model, inputs = fresh("qwen3_vl")
    words = make_inputs(BY_NAME["qwen3_vl"], model, [Row(7, seed=3)])
    with pytest.raises(KeepsightError, match="no batch had an image"):
        distill(model, [words], steps=1)
    with pytest.raises(KeepsightError, match="ended after 1 of 3"):
        distill(model, iter([inputs]), steps=3)
    with pytest.raises(KeepsightError, match="steps=0"):
        distill(model, [inputs], steps=0)
    with pytest.raises(KeepsightError, match="kinds"):
        distill(model, [inputs], steps=1, kinds=("middle",))
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(KeepsightError, match="active"):
        distill(model, [inputs], steps=1)
