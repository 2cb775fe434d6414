"""Rollouts are what they say, and the training pass sees the very distribution they were drawn from."""

from __future__ import annotations

import pytest
import torch
from helpers import attach as attach_pvm
from vismem_training import FAMILY_NAMES, RANDOM, ROWS, model_and_prompts, rolled, seeds, written

from keepsight.errors import KeepsightError
from keepsight.train.vismem.grpo import clipped_loss, group_advantages, trajectory_mean
from keepsight.train.vismem.replay import (
    Prefixes,
    chosen_mask,
    formed_latents,
    log_probs,
    log_probs_without_memory,
    recorded_latents,
)
from keepsight.train.vismem.rollout import counterfactuals, sample
from keepsight.vismem import MemoryPolicy, VisMemBranch
from keepsight.vismem.tokens import MemoryTokens

CLOSE = {"rtol": 0.0, "atol": 3e-5}


@pytest.fixture(params=FAMILY_NAMES)
def name(request):
    return request.param


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x.ids, y.ids) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("policy", [RANDOM, MemoryPolicy("free", max_invocations=2)], ids=["random", "free"])
def test_training_sees_the_distribution_of_the_rollout(name, policy):
    """Log-probs of one uncached forward equal those of cached decoding, with ragged rows and memories in them."""
    model, prompts = model_and_prompts(name)
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(3.0)
    # What the generation config says of sampling is not in the log-probs, so it must not be in the rollout.
    model.get_base_model().generation_config.update(top_k=3, repetition_penalty=1.4, temperature=0.01, top_p=0.3)
    trajectories, there = rolled(model, prompts, policy, temperature=1.3)
    assert {i.kind for t in trajectories for i in t.invocations} == {"short", "long"}
    assert any(not t.invoked for t in trajectories) or policy.name == "free"
    with torch.no_grad():
        recorded, formed = recorded_latents(model, trajectories), formed_latents(model, trajectories)
        torch.testing.assert_close(formed, recorded, **CLOSE)
        torch.testing.assert_close(log_probs(model, prompts, trajectories, formed, 1.3), there, **CLOSE)
        # The bound can fail: other latents, or another temperature, are a thousand times further off.
        assert (log_probs(model, prompts, trajectories, recorded.flip(0), 1.3) - there).abs().max() > 0.03
        assert (log_probs(model, prompts, trajectories, recorded, 1.0) - there).abs().max() > 0.03


def test_memories_of_the_token_sequence_are_formed_again_as_they_were():
    model, prompts = model_and_prompts("qwen3_vl", long_input="tokens", max_text_states=3)
    trajectories = written(model, prompts, RANDOM)
    assert any(i.kind == "long" for t in trajectories for i in t.invocations)
    with torch.no_grad():
        torch.testing.assert_close(formed_latents(model, trajectories), recorded_latents(model, trajectories), **CLOSE)


def test_a_trajectory_does_not_depend_on_those_beside_it(name):
    model, prompts = model_and_prompts(name)
    together = written(model, prompts)
    for rows in (1, 2, 3):
        assert same(written(model, prompts, rows_per_call=rows), together)
    alone = sample(model, prompts[1:2], seeds(9)[3:6], RANDOM, copies=3, max_words=14)
    assert same(alone, together[3:6])
    assert [t.prompt for t in together] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    other = sample(model, prompts, seeds(9, "other"), RANDOM, copies=3, max_words=14)
    assert not any(same([a], [b]) for a, b in zip(together, other, strict=True))


def test_memories_cost_no_words(name):
    """Every trajectory has as many words as another, however many memories it holds."""
    model, prompts = model_and_prompts(name)
    tokens = MemoryTokens(VisMemBranch.of(model).config.token_ids)
    for t in written(model, prompts):
        assert int((~tokens.memory_mask(t.ids)).sum()) == 14
        assert int(t.chosen.sum()) == 14  # invocations were the policy's
        assert (~t.chosen).sum() == sum(len(i.latents) + 2 for i in t.invocations)


def test_random_places():
    """At delimiters, or anywhere; never straight after a memory; the types in equal shares."""
    model, prompts = model_and_prompts("qwen3_vl")
    branch = VisMemBranch.of(model)
    delimiters, ends = branch.config.delimiter_ids, MemoryTokens(branch.config.token_ids).end.values()
    for places in ("delimiters", "anywhere"):
        policy = MemoryPolicy("random", probability=1.0, places=places)
        found = sample(model, prompts[:2], seeds(60), policy, copies=30, max_words=30)
        before = [int(t.ids[i.position - 1]) for t in found for i in t.invocations if i.position]
        assert before
        assert not set(before) & set(ends)
        assert (set(before) <= set(delimiters)) == (places == "delimiters")
        assert all(t.invocations[0].position == 0 for t in found if t.invoked) == (places == "anywhere")
        kinds = [i.kind for t in found for i in t.invocations]
        assert 0.35 < kinds.count("short") / len(kinds) < 0.65
    assert all(
        i.kind == "long"
        for t in sample(model, prompts[2:], seeds(9), policy, copies=9, max_words=30)
        for i in t.invocations
    )


@pytest.mark.parametrize("kind", ["without", "other"])
def test_counterfactuals_share_the_beginning(name, kind):
    model, prompts = model_and_prompts(name)
    trajectories = written(model, prompts)
    found = counterfactuals(model, prompts, trajectories, seeds(9, kind), kind, max_words=14)
    tokens = MemoryTokens(VisMemBranch.of(model).config.token_ids)
    assert any(t.invoked for t in trajectories)
    for before, after in zip(trajectories, found, strict=True):
        assert after.prompt == before.prompt
        if not before.invoked:
            assert after is before
            continue
        first = before.invocations[0]
        if kind == "other" and not ROWS[before.prompt].images:
            assert after is before  # the other type would be short, and there is no image
            continue
        start = first.position
        assert torch.equal(after.ids[:start], before.ids[:start])
        assert not after.chosen[:start].any()
        assert int((~tokens.memory_mask(after.ids)).sum()) == 14
        if kind == "without":
            assert not after.invoked
        else:
            assert after.invocations[0].kind != first.kind
            # A well-formed pair, and only the first memory is turned: what follows is the model's own choice.
            token = MemoryTokens(VisMemBranch.of(model).config.token_ids).invoke[after.invocations[0].kind]
            assert after.ids[start] == token
            assert all(i.kind == i.invoked_as for i in after.invocations)
            before_token, after_token = first.formation.text[:-1], after.invocations[0].formation.text[:-1]
            assert torch.allclose(after_token, before_token, **CLOSE)


def test_the_reference_is_the_model_without_memory(name):
    """Words get the log-probs that the bare base gives them in the text without memories."""
    model, prompts = model_and_prompts(name)
    trajectories = written(model, prompts)
    tokens = MemoryTokens(VisMemBranch.of(model).config.token_ids)
    with torch.no_grad():
        found = log_probs_without_memory(model, prompts, trajectories)
        for row, t in enumerate(trajectories):
            words = t.ids[~tokens.memory_mask(t.ids)]
            prompt = dict(prompts[t.prompt])
            length = prompt["input_ids"].shape[1]
            for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
                if key in prompt:
                    added = words if key == "input_ids" else torch.full_like(words, key == "attention_mask")
                    prompt[key] = torch.cat([prompt[key], added[None].to(prompt[key])], 1)
            with model.disable_adapter():
                logits = model(**prompt).logits[0, length - 1 : -1]
            logits[:, [120, 121] if name != "internvl_qwen3" else [120]] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, words[:, None])[:, 0]
            torch.testing.assert_close(found[row][: len(t.ids)][t.chosen], expected, **CLOSE)
            assert not found[row][: len(t.ids)][~t.chosen].any()


def test_gradients_of_stage_one_reach_the_formers_and_only_them(name):
    model, prompts = model_and_prompts(name)
    model.requires_grad_(True)
    trajectories = written(model, prompts)
    memory = VisMemBranch.of(model).active
    base = {n: p for n, p in model.named_parameters() if "latent_memory" not in n}
    for parameter in base.values():
        parameter.requires_grad_(False)
    log_probs(model, prompts, trajectories, formed_latents(model, trajectories)).sum().backward()
    for path, parameter in memory.named_parameters():
        if not path.startswith("rows.") and "layers.1.down.bias" not in path:
            assert parameter.grad is not None, path
            assert parameter.grad.abs().max() > 0, path
    model.zero_grad()
    log_probs(model, prompts, trajectories, recorded_latents(model, trajectories)).sum().backward()
    with_gradient = {path for path, p in memory.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert with_gradient
    assert all(path.startswith("rows.") for path in with_gradient)


def test_gradients_equal_finite_differences():
    """Of the trained quantity, with the hidden states as recorded, along random directions."""
    model, prompts = model_and_prompts("qwen2_5_vl")
    trajectories = written(model, prompts, copies=2)
    model = model.double()
    prompts = [{n: v.double() if v.is_floating_point() else v for n, v in p.items()} for p in prompts]
    for t in trajectories:
        for i in t.invocations:
            f = i.formation
            f.text, f.sight.visual = f.text.double(), f.sight.visual.double()
            patches = f.sight.patches
            if patches is not None and patches.x.dtype != torch.float64:
                rotary = patches.rotary and tuple(r.double() for r in patches.rotary)
                f.sight.patches = type(patches)(
                    patches.x.double(), patches.images, patches.windows, rotary, patches.extent
                )
    weights = torch.randn(len(trajectories), max(len(t.ids) for t in trajectories)).double()

    def objective():
        return (log_probs(model, prompts, trajectories, formed_latents(model, trajectories)) * weights).sum()

    memory = VisMemBranch.of(model).active
    objective().backward()
    for path in ("builder.queries", "short_slots", "long_slots", "short_gain", "long_gain", "to_vision.weight"):
        parameter = memory.get_parameter(path)
        torch.manual_seed(0)
        direction = torch.randn_like(parameter)
        step = 3e-3 * parameter.norm() / direction.norm()
        with torch.no_grad():
            parameter += step * direction
            up = objective()
            parameter -= 2 * step * direction
            down = objective()
            parameter += step * direction
        slope, expected = (up - down) / (2 * step), (parameter.grad * direction).sum()
        # The base's own norms compute in float32, which limits what a difference can resolve.
        noise = 1e-2 * parameter.grad.norm() * direction.norm()
        assert abs(slope - expected) <= 2e-2 * abs(expected) + noise, path
        assert expected != 0


def test_steps_raise_the_objective_on_their_own_trajectories():
    """The sign of the whole chain: rewarded words become likelier under memories that are formed anew."""
    model, prompts = model_and_prompts("qwen2_5_vl")
    trajectories = written(model, prompts[:2], copies=6)
    memory = VisMemBranch.of(model).active
    trained = [p for n, p in memory.named_parameters() if not n.startswith("rows.")]
    scores = torch.tensor([(t.ids[t.chosen] < 60).float().mean() for t in trajectories])
    advantages, mask = group_advantages(scores, 6), chosen_mask(trajectories)
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    before, objectives = None, []
    for _ in range(4):
        found = log_probs(model, prompts, trajectories, formed_latents(model, trajectories))
        before = found.detach() if before is None else before
        loss = trajectory_mean(clipped_loss(found, before, advantages, 0.2), mask).mean()
        objectives.append(-loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objectives == sorted(objectives)
    assert objectives[-1] > objectives[0] + 1e-3


@pytest.mark.parametrize("copies", [1, 3])
def test_shadows_are_replays(name, copies):
    """What is written beside a trajectory is what a replay of its beginning, without memory, goes on to write."""
    model, prompts = model_and_prompts(name)
    own, other = seeds(3 * copies, "trajectories"), seeds(3 * copies, "shadows")
    for limit in (None, 2):
        found = sample(
            model, prompts, own, RANDOM, copies=copies, max_words=14, rows_per_call=limit, shadow_seeds=other
        )
        assert same(found, sample(model, prompts, own, RANDOM, copies=copies, max_words=14))
        replays = counterfactuals(model, prompts, found, other, "without", max_words=14)
        assert any(t.invoked for t in found)
        for trajectory, replay in zip(found, replays, strict=True):
            if not trajectory.invoked:
                assert trajectory.without is None
                continue
            shadow = trajectory.without
            assert same([shadow], [replay])
            assert shadow.prompt == replay.prompt == trajectory.prompt
            assert torch.equal(shadow.chosen, replay.chosen)
            assert torch.equal(shadow.admitted, replay.admitted)
            assert not shadow.invoked
    # The test can fail: other seeds write other shadows.
    others = counterfactuals(model, prompts, found, seeds(3 * copies, "others"), "without", max_words=14)
    assert any(t.invoked and not same([t.without], [o]) for t, o in zip(found, others, strict=True))


def test_prompts_read_once_give_the_same_log_probs_and_gradients(name):
    """Keys and values of the prompts stand for the prompts, in ragged batches and in any order of the rows."""
    model, prompts = model_and_prompts(name)
    trajectories = written(model, prompts)
    order = [5, 0, 8, 3, 2, 6]
    some = [trajectories[i] for i in order]
    memory = VisMemBranch.of(model).active
    parameters = [p for n, p in memory.named_parameters() if not n.startswith("rows.")]
    prefixes = Prefixes(model, prompts)
    found, gradients = {}, {}
    for way in (None, prefixes):
        latents = formed_latents(model, some)
        values = log_probs(model, prompts, some, latents, 1.3, way)
        found[way is None] = (values.detach(), log_probs_without_memory(model, prompts, some, 1.3, way).detach())
        gradients[way is None] = torch.autograd.grad(values.sum(), parameters, allow_unused=True)
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(gradients[True], gradients[False], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4 * float(a.abs().max()) + 1e-6)
    # Another prompt's states are another prompt's.
    wrong = log_probs(model, prompts, some, latents.detach(), 1.3, Prefixes(model, [*prompts[1:], prompts[0]]))
    assert (wrong - found[True][0]).abs().max() > 0.03


@pytest.mark.parametrize(
    ("setting", "culprit"),
    [
        ({"typical_p": 0.5}, "TypicalLogitsWarper"),
        ({"min_p": 0.2}, "MinPLogitsWarper"),
        ({"sequence_bias": [[[7], 3.0]]}, "SequenceBiasLogitsProcessor"),
        ({"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 1}, "ExponentialDecayLengthPenalty"),
    ],
)
def test_what_training_could_not_compute_again_is_refused(setting, culprit):
    model, prompts = model_and_prompts("qwen2_5_vl")
    model.get_base_model().generation_config.update(**setting)
    with pytest.raises(KeepsightError, match=culprit):
        written(model, prompts)


def test_beside_a_visual_memory_whole_sequences_are_read():
    """Keys and values of the decoder do not stand for what a PVM remembers: it must not be switched off unsaid."""
    model, prompts = model_and_prompts("qwen2_5_vl")
    assert Prefixes.can_read(model)
    attach_pvm(model.get_base_model(), adapter_name="pvm")
    assert not Prefixes.can_read(model)
    with pytest.raises(KeepsightError, match="prefixes=None"):
        Prefixes(model, prompts)
    trajectories, there = rolled(model, prompts)
    with torch.no_grad():
        again = log_probs(model, prompts, trajectories, recorded_latents(model, trajectories))
    torch.testing.assert_close(again, there, **CLOSE)
