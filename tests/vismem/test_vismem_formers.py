"""A memory is what its definition says, and forming it leaves no trace."""

import copy

import pytest
import torch
from families import Row, make_inputs
from helpers import with_continuation
from peft import LoraConfig, get_peft_model
from vismem_helpers import BY_NAME, CLOSE, ROWS, attach, built, forced, generate

from keepsight.backbone import Backbone
from keepsight.compat import enable_checkpointing
from keepsight.errors import KeepsightError
from keepsight.vismem import VisMemBranch, VisMemConfig, scope, splice
from keepsight.vismem.formers import Formers
from keepsight.vismem.memory import Formation, Sight
from keepsight.vismem.module import match_rms
from keepsight.vismem.sequences import pad
from keepsight.vismem.vision import VisionWalk

TYPES = ("short", "long")


def formed(name, rows=None, plan=None, **config):
    """(model, inputs, output) with one memory of each type in the first row."""
    model, inputs = built(name, rows or [Row(3, (1, 2), 2, (2, 2), 4, seed=1)], **config)
    return model, inputs, generate(model, inputs, memory=forced(plan or [{2: "short", 5: "long"}]))


def fresh(formation):
    """The same, with nothing kept."""
    return Formation(Sight(formation.sight.visual, formation.sight.patches), formation.text)


def merged_tower(branch):
    """A copy of the vision encoder with the short-term former's updates added to its weights."""
    tower = copy.deepcopy(branch.backbone.vision_tower)
    parts, width = branch.backbone.vision, branch.backbone.vision_size
    for index, block in enumerate(tower.get_submodule(parts.blocks)):
        attention = getattr(block, parts.attention)
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            update = branch.active.short_bank.get(index, name)
            if update is not None:
                weight = getattr(attention, parts.qkv[part if len(parts.qkv) == 3 else 0]).weight
                weight = weight if len(parts.qkv) == 3 else weight[part * width :][:width]
                weight.data += update.up @ update.down * update.scale
    return tower


def in_squares(backbone, states, extent):
    """The patches [S, d] of an image of `extent`, as the squares [N, s * s, d] that its visual tokens stand for."""
    side, width = backbone.merge_side, states.shape[-1]
    if backbone.patches_are_in_order:
        return states.view(-1, side * side, width)
    rows, columns = extent
    grid = states[-rows * columns :].view(rows // side, side, columns // side, side, width)  # behind a class token
    return grid.transpose(1, 2).reshape(-1, side * side, width)


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
def test_walk_and_projection_of_patches_are_the_models_own(any_name, adapted):
    """Our pass through the encoder and its projector gives the visual embeddings that enter the decoder.

    Under the adapter they are those of a model whose encoder has the adapter merged into its weights.
    """
    model, inputs = built(any_name)
    branch, backbone, entered = VisMemBranch.of(model), Backbone.of(model), []
    sights = generate(model, inputs, n=4, memory=forced({})).sights
    walk = VisionWalk(backbone, branch.active.short_bank if adapted else None)
    if adapted:
        setattr(backbone.vlm, backbone.family.vision_tower, merged_tower(branch))
    backbone.decoder.register_forward_pre_hook(
        lambda m, a, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with model.disable_adapter():
        model(**inputs)
    visual = backbone.visual_mask(inputs["input_ids"])
    for row in (0, 1):
        patches = sights[row].patches
        first, (rows, columns) = patches.images[0], patches.extent
        if first < rows * columns:  # the first image of two, and the smaller one
            rows = first // columns
        ours = backbone.project_vision(in_squares(backbone, walk.states(patches)[:first], (rows, columns)))
        theirs = entered[0][row][visual[row]]
        if any_name in ("idefics3", "smolvlm") and row == 0:  # here two of the four tokens are padding
            assert len(ours) == 2
        theirs = theirs[: len(ours)]
        torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("copies", [1, 2])
def test_every_row_gets_its_own_patches(name, copies):
    rows = [Row(1, (2, 2), 5, seed=2), Row(7, seed=3), Row(3, (1, 2), 4, seed=1)]
    if not BY_NAME[name].marks and copies > 1:
        rows = rows[:1] + rows[2:]
    if copies > 1:
        BY_NAME[name].skip_wrong_copies()
    model, inputs = built(name, rows)
    out = generate(model, inputs, n=4, num_return_sequences=copies, memory=forced({}), do_sample=copies > 1)
    for i, row in enumerate(rows):
        alone = generate(model, make_inputs(BY_NAME[name], model, [row]), n=4, memory=forced({}))
        for sight in out.sights[i * copies : (i + 1) * copies]:
            assert (sight.patches is None) == (not row.images)
            torch.testing.assert_close(sight.visual, alone.sights[0].visual, **CLOSE)
            if row.images:
                torch.testing.assert_close(sight.patches.x, alone.sights[0].patches.x, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl_qwen3", "llava_onevision"])
def test_literal_short_memory_is_the_encoder_with_appended_positions(name):
    """One image: the encoder's own forward, its weights with the adapter merged, and our positions appended.

    On encoders of three kinds; the others are held to the definition with dense masks below.
    """
    model, inputs, out = formed(
        name, [Row(3, (2, 2), 4, seed=1)] if name != "llava_onevision" else [Row(3, (1, 1), (1, 1), 4, seed=1)]
    )
    branch = VisMemBranch.of(model)
    invocation = out.invocations[0][0]
    patches = invocation.formation.sight.patches
    if len(patches.images) > 1:  # one tile of the two
        n = patches.images[0]
        patches = type(patches)(patches.x[:n], (n,), (n,), None, patches.extent)
    formers, tower = branch.formers(), merged_tower(branch)
    own = torch.randn(7, branch.backbone.vision_size)
    walk = VisionWalk(branch.backbone, branch.active.short_bank)
    if name == "qwen3_vl":
        from transformers.vision_utils import get_vision_position_ids as places

        grid = inputs["image_grid_thw"]
        mine = torch.stack([torch.full((7,), 9), torch.arange(7)], -1)
        ids = torch.cat([places(grid, 2), mine])
        rotary = formers._rotary(mine, own)
        # Position embeddings are in patches.x already, so they are switched off here.
        indices, weights = torch.zeros(len(ids), 4, dtype=torch.long), torch.zeros(len(ids), 4)
        tower.patch_embed.register_forward_hook(lambda m, a, o: torch.cat([patches.x, own]))
        tower.merger = torch.nn.Identity()
        tower.deepstack_merger_list = torch.nn.ModuleList([torch.nn.Identity()])
        states = tower(
            inputs["pixel_values"],
            grid_thw=grid,
            position_ids=ids,
            interp_indices=indices,
            interp_weights=weights,
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        ).last_hidden_state[-7:]
    else:
        rotary = None
        if branch.backbone.vision.final_norm is None:  # the projector reads the last block
            tower.post_layernorm = torch.nn.Identity()
        embeddings = tower.embeddings
        embeddings.register_forward_hook(lambda m, a, o: torch.cat([patches.x, own])[None])
        states = tower(inputs["pixel_values"].flatten(0, -4)[:1]).last_hidden_state[0, -7:]
    torch.testing.assert_close(walk.through(patches, own, rotary) / states.std(), states / states.std(), **CLOSE)


@torch.no_grad()
def dense(walk, patches, own, rotary):
    """The definition with one dense mask per block over [patches | own], nothing segmented."""
    total = len(patches.x)
    x = torch.cat([patches.x, own])
    if rotary is not None:
        rotary = tuple(torch.cat([a, b]) for a, b in zip(patches.rotary, rotary, strict=True))
    for index in range(walk.depth):
        windowed = index in walk.windowed
        mask = torch.zeros(len(x), len(x), dtype=torch.bool)
        start = 0
        for length in patches.windows if windowed else patches.images:
            mask[start : start + length, start : start + length] = True
            start += length
        mask[total:, total:] = True
        if not windowed:
            mask[total:, :total] = True
            mask[:total, total:] = True
        query, key, value = (t.transpose(0, 1) for t in walk._qkv(index, x, rotary))
        weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        x = walk._finish(index, x, (weights @ value).transpose(0, 1))
    return walk._normed(x[total:]) if walk.depth == len(walk.blocks) else x[total:]


def test_short_memory_equals_its_definition_with_dense_masks(name):
    model, _, out = formed(name, plan=[{0: "short"}], slot_layout="grid")
    branch = VisMemBranch.of(model)
    patches = out.invocations[0][0].formation.sight.patches
    assert len(patches.images) > 1
    walk, own = VisionWalk(branch.backbone, branch.active.short_bank), torch.randn(6, branch.backbone.vision_size)
    places = torch.stack([torch.arange(6), torch.arange(6) % 2], -1)
    rotary = branch.formers()._rotary(places, own)
    with torch.no_grad():
        ours = walk.through(patches, own, rotary)
    expected = dense(walk, patches, own, rotary)
    torch.testing.assert_close(ours / expected.std(), expected / expected.std(), **CLOSE)


@torch.no_grad()
def long_definition(branch, formation):
    """M = F_l([X, Q, M_init])[-N:] in one uncached pass per part."""
    memory, formers = branch.active, branch.formers()
    visual, text = formation.sight.visual[None], formation.text[None]
    seen, thought = (torch.ones(1, t.shape[1], dtype=torch.bool) for t in (visual, text))
    queries = memory.builder(visual, seen, text, thought)
    x = torch.cat([match_rms(t, memory.embedding_rms) for t in (visual, text, queries)] + [memory.long_slots[None]], 1)
    with scope.base_only():
        states = formers._decode(x, torch.ones(1, x.shape[1], dtype=torch.bool))
    return memory.as_embeddings(states[:, -branch.config.num_long :], short=False)[0]


def test_long_memory_equals_its_definition(name):
    model, _, out = formed(name, ROWS, [{0: "long", 4: "long"}, {0: "short", 4: "long"}, {4: "long"}])
    branch = VisMemBranch.of(model)
    for row in out.invocations:
        for invocation in row:
            if invocation.kind == "long":
                expected = long_definition(branch, invocation.formation)
                torch.testing.assert_close(invocation.latents, expected, **CLOSE)


@pytest.mark.parametrize("kind", TYPES)
def test_batch_of_formations_equals_singles(name, kind):
    model, _, out = formed(name, ROWS, [{0: kind}, {4: kind}, {} if kind == "short" else {2: kind}])
    formations = [i.formation for row in out.invocations for i in row]
    formers = VisMemBranch.of(model).formers()
    with torch.no_grad():
        together = formers.form(kind, [fresh(f) for f in formations])
        for one, f in zip(together, formations, strict=True):
            torch.testing.assert_close(formers.form(kind, [fresh(f)])[0], one, **CLOSE)


def test_memory_is_formed_from_the_uncached_hidden_states(name):
    """What a formation records is what one uncached forward sees: visual states, and text since the last memory."""
    model, inputs, out = formed(name)
    from keepsight.vismem import splice

    prompt = inputs["input_ids"].shape[1]
    states = []
    handle = Backbone.of(model).decoder.register_forward_hook(lambda m, a, o: states.append(o.last_hidden_state))
    with torch.no_grad(), splice(model, out.sequences, out.invocations):
        model(**with_continuation(inputs, out.sequences[:, prompt:]), use_cache=False)
    handle.remove()
    first, second = out.invocations[0]
    visual = Backbone.of(model).visual_mask(out.sequences)[0]
    torch.testing.assert_close(first.formation.sight.visual, states[0][0][visual], **CLOSE)
    torch.testing.assert_close(first.formation.text, states[0][0][prompt : first.position + 1], **CLOSE)
    after = first.position + 1 + len(first.latents) + 1
    torch.testing.assert_close(second.formation.text, states[0][0][after : second.position + 1], **CLOSE)


def test_text_states_are_capped(name):
    plan = [{6: "long"}]
    model, _, out = formed(name, plan=plan, max_text_states=2)
    formation = out.invocations[0][0].formation
    assert len(formation.text) == 2
    _, _, full = formed(name, plan=plan)
    torch.testing.assert_close(formation.text, full.invocations[0][0].formation.text[-2:], **CLOSE)
    capped = Formers(Backbone.of(model), VisMemBranch.of(model).active, VisMemBranch.of(model).config)
    with torch.no_grad():  # also when a formation holds more
        again = capped.form("long", [fresh(full.invocations[0][0].formation)])[0]
    torch.testing.assert_close(again, out.invocations[0][0].latents, **CLOSE)


def test_gradients_equal_finite_differences(name):
    model, _, out = formed(name)
    model = model.double()
    branch = VisMemBranch.of(model)
    formations = [copy.deepcopy(i.formation) for i in out.invocations[0]]
    for f in formations:
        patches = f.sight.patches
        rotary = patches.rotary and tuple(t.double() for t in patches.rotary)
        f.sight.visual, f.text = f.sight.visual.double(), f.text.double()
        f.sight.patches = type(patches)(patches.x.double(), patches.images, patches.windows, rotary, patches.extent)
    weights = [torch.randn_like(i.latents).double() for i in out.invocations[0]]

    def objective():
        formers = branch.formers()
        return sum(
            (formers.form(k, [fresh(f)])[0] * w).sum() for k, f, w in zip(TYPES, formations, weights, strict=True)
        )

    memory = branch.active
    objective().backward()
    for path, parameter in memory.named_parameters():
        if path.startswith("rows."):
            assert parameter.grad is None, path  # formation does not touch the tokens
            continue
        torch.manual_seed(0)
        direction = torch.randn_like(parameter)
        expected = (parameter.grad * direction).sum()
        if "layers.1.down.bias" not in path:
            assert expected != 0, path
        # The base's own norms compute in float32, which limits what a difference can resolve: a long step is bent where
        # the memory is steep, a short one is lost in rounding.
        bound, slopes = 2e-2 * abs(expected) + 1e-2 * parameter.grad.norm() * direction.norm(), []
        for length in (1e-3, 3e-4):
            step = length * parameter.norm().clamp(min=0.3) / direction.norm()
            with torch.no_grad():
                parameter += step * direction
                up = objective()
                parameter -= 2 * step * direction
                down = objective()
                parameter += step * direction
            slopes.append(((up - down) / (2 * step)).item())
            if abs(slopes[-1] - expected) <= bound:
                break
        else:
            raise AssertionError(f"{path}: {slopes}, expected {expected.item()}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    grads = []
    for checkpointing in (False, True):
        model, _, out = formed(name)
        branch = VisMemBranch.of(model)
        base = model.get_base_model()
        base.train()
        for module in branch.active.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        if checkpointing:
            enable_checkpointing(base, reentrant)
        formers = branch.formers()
        total = sum(
            formers.form(i.kind, [fresh(i.formation)]).pow(2).sum() * 1e-3
            + formers.form(i.kind, [fresh(i.formation)])[..., 0].sum()
            for i in out.invocations[0]
        )
        total.backward()
        grads.append({n: p.grad for n, p in branch.active.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for path, grad in grads[0].items():
        torch.testing.assert_close(grads[1][path], grad, rtol=1e-4, atol=1e-4)


def test_policy_lora_stays_out_of_formations(name):
    model, inputs, out = formed(name)
    branch = VisMemBranch.of(model)
    get_peft_model(
        model.get_base_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False), adapter_name="policy"
    )
    assert (generate(model, inputs, n=1, memory=forced([{}])).logits[0] - out.logits[0]).abs().max() > 1e-2
    with torch.no_grad():
        for invocation in out.invocations[0]:
            again = branch.formers().form(invocation.kind, [fresh(invocation.formation)])[0]
            torch.testing.assert_close(again, invocation.latents, **CLOSE)


def test_no_adapter_is_active_after_an_exception_in_mid_formation(name):
    model, inputs = built(name)
    branch = VisMemBranch.of(model)
    before = generate(model, inputs, memory=forced())
    handles = [
        branch.backbone.layers[2].register_forward_pre_hook(_fail_while_forming),
        getattr(branch.backbone.vision_blocks[0], branch.backbone.vision.mlp).register_forward_pre_hook(
            _fail_while_forming
        ),
    ]
    for kind in TYPES:
        with pytest.raises(RuntimeError, match="in the middle"):
            generate(model, inputs, memory=forced([{1: kind}, {}, {}]))
        assert scope.calls.here.bank is None
        assert not scope.is_base_only()
        assert scope.current_splice() is scope.current_watch() is None
    for handle in handles:
        handle.remove()
    after = generate(model, inputs, memory=forced())
    assert after.sequences.tolist() == before.sequences.tolist()
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits), rtol=0, atol=0)


def _fail_while_forming(module, args):
    if scope.is_base_only():
        raise RuntimeError("in the middle")


def test_base_is_bit_identical_before_and_after(name):
    base = BY_NAME[name].build().requires_grad_(False)  # as adapters freeze it: torch adds up in another order then
    inputs = make_inputs(BY_NAME[name], base, ROWS)
    start = {k: v.clone() for k, v in base.state_dict().items()}
    with torch.no_grad():
        logits = base(**inputs).logits
    modules = [n for n, _ in base.named_modules()]
    model = attach(base)
    generate(model, inputs, memory=forced())
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).logits, logits)
    attached = base.state_dict()
    assert all(torch.equal(attached[k], v) for k, v in start.items())
    assert model.unload() is base
    after = base.state_dict()
    assert after.keys() == start.keys()
    assert all(torch.equal(after[k], v) for k, v in start.items())
    assert [n for n, _ in base.named_modules()] == modules
    hooks = [h for m in base.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [h for h in hooks if "keepsight" in getattr(getattr(h, "func", h), "__module__", "")]
    assert "generate" not in vars(base)
    with torch.no_grad():
        assert torch.equal(base(**inputs).logits, logits)


def test_defaults_are_the_papers():
    config = VisMemConfig()
    assert (config.num_queries, config.num_short, config.num_long) == (8, 8, 16)
    assert (config.short_rank, config.short_alpha, config.short_dropout) == (16, 32, 0.1)
    assert (config.long_rank, config.long_alpha, config.long_dropout) == (16, 32, 0.1)
    assert config.short_targets == config.long_targets == ["q_proj", "v_proj"]
    assert config.max_text_states is None


def test_pad_is_left_and_masked():
    stacked, valid = pad([torch.ones(2, 3), torch.ones(4, 3)])
    assert valid.tolist() == [[False, False, True, True], [True] * 4]
    assert stacked[0, :2].abs().max() == 0


@pytest.mark.parametrize("limit", [None, 2])
def test_long_memory_of_the_token_sequence_equals_its_definition(name, limit):
    """X is what the decoder was given: prompt, question, image, text and earlier memories, padding left out."""
    plans = [{0: "long", 4: "long"}, {0: "short", 4: "long"}, {4: "long"}]
    model, inputs, out = formed(name, ROWS, plans, long_input="tokens", max_text_states=limit)
    branch = VisMemBranch.of(model)
    backbone, memory, formers = branch.backbone, branch.active, branch.formers()
    start = inputs["input_ids"].shape[1]
    whole = with_continuation(inputs, out.sequences[:, start:])
    given = []
    handle = backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), splice(model, out.sequences, out.invocations):
        model(**whole, use_cache=False)
    handle.remove()
    for row, invocations in enumerate(out.invocations):
        for invocation in (i for i in invocations if i.kind == "long"):
            formation = invocation.formation
            prompt = given[0][row, :start][inputs["attention_mask"][row].bool()]
            text = given[0][row, start : invocation.position + 1]
            sequence = torch.cat([prompt, text if limit is None else text[-limit:]])[None]
            visual, thought = formation.sight.visual[None], formation.text[None]
            seen, known = (torch.ones(1, t.shape[1], dtype=torch.bool) for t in (visual, thought))
            with torch.no_grad(), scope.base_only():
                queries = match_rms(memory.builder(visual, seen, thought, known), memory.embedding_rms)
                x = torch.cat([sequence, queries, memory.long_slots[None]], 1)
                states = formers._decode(x, torch.ones(1, x.shape[1], dtype=torch.bool))
                expected = memory.as_embeddings(states[:, -branch.config.num_long :], short=False)[0]
            torch.testing.assert_close(invocation.latents, expected, **CLOSE)
    _, _, states = formed(name, ROWS, plans, max_text_states=limit)
    assert not torch.allclose(states.invocations[2][0].latents, out.invocations[2][0].latents)


def test_a_token_sequence_that_was_not_kept_is_an_error():
    model, _, out = formed("qwen3_vl")
    branch = VisMemBranch.of(model)
    branch.config.long_input = "tokens"
    with pytest.raises(KeepsightError, match="were not kept here"):
        branch.formers().form("long", [out.invocations[0][1].formation])
