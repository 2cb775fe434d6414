"""Filters, penalties, loops and conversations: what is chosen, and from which distribution."""

import itertools
import warnings
from typing import Any

import pytest
import torch
from families import FAMILIES, Row, make_inputs
from helpers import with_continuation
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from vismem_helpers import BY_NAME, CLOSE, SIZES, at_choices, attach, built, forced, generate, uncached

import keepsight
from keepsight.vismem import MemoryPolicy, VisMemBranch, VisMemConfig, splice

FILTERS = {
    "temperature": ({"temperature": 0.6}, TemperatureLogitsWarper(0.6)),
    "top_k": ({"top_k": 2}, TopKLogitsWarper(2)),
    "top_p": ({"top_p": 0.5}, TopPLogitsWarper(0.5)),
    "min_p": ({"min_p": 0.3}, MinPLogitsWarper(0.3)),
    "typical": ({"typical_p": 0.4}, TypicalLogitsWarper(0.4)),
}
PLAIN = {"do_sample": True, "top_k": 0, "output_scores": True, "logits_processor": []}
loops = pytest.mark.filterwarnings("ignore:An invocation loop")


def loving(model, bias=8.0):
    """A model that wants memory all the time: where it may not, a filter has little else to keep."""
    with torch.no_grad():
        VisMemBranch.of(model).active.rows.invoke_bias.fill_(bias)
    return model


@loops
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl_qwen3"])
def test_filters_see_only_what_may_be_chosen(family, name):
    """What is forbidden is so before the filter; and the same distribution comes out of one uncached forward."""
    options, warper = FILTERS[name]
    rows = [Row(3, (1, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2)]
    model, inputs = built(family, rows)
    loving(model)
    base = model.get_base_model()
    base.generation_config.suppress_tokens = [*range(5), *range(115, 128)]  # placeholders would ask for pixels
    suppressed = torch.tensor(base.generation_config.suppress_tokens)
    for seed in range(3):
        torch.manual_seed(seed)
        out = generate(model, inputs, n=30, memory=MemoryPolicy("free", max_invocations=2), **(PLAIN | options))
        assert all(len(row) for row in out.invocations)
    scores = uncached(model, inputs, out).flatten(0, 1)
    tokens, allowed = VisMemBranch.of(model).tokens, out.allowed.flatten(0, 1)
    scores[:, list(tokens.end.values())] = -torch.inf
    for column, token in enumerate(tokens.invoke.values()):
        scores[:, token] = scores[:, token].masked_fill(~allowed[:, column], -torch.inf)
    scores[:, suppressed] = -torch.inf
    scores = warper(None, scores).view(*out.sampled.shape, -1)
    chosen = out.sequences[:, inputs["input_ids"].shape[1] :, None]
    again, rolled = (s.log_softmax(-1).gather(-1, chosen)[..., 0] for s in (scores, torch.stack(out.scores, 1)))
    assert torch.isfinite(at_choices(out, rolled)).all()
    torch.testing.assert_close(at_choices(out, again), at_choices(out, rolled), **CLOSE)


def test_no_processor_can_allow_what_is_forbidden():
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])

    def only_ends(ids, scores):
        return torch.where(torch.arange(scores.shape[-1]) == 129, 0.0, scores)

    out = generate(model, inputs, n=8, memory=forced([{}]), logits_processor=[only_ends])
    assert not VisMemBranch.of(model).tokens.memory_mask(out.sequences[0]).any()


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_processor_that_leaves_only_what_is_forbidden_is_named(do_sample):
    """Sampling would end in "probability tensor contains inf", the likeliest of none would be token 0."""
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    end = VisMemBranch.of(model).tokens.end["long"]
    options = {"do_sample": do_sample, "logits_processor": [], "prefix_allowed_tokens_fn": lambda row, ids: [end]}
    with pytest.raises(keepsight.KeepsightError, match="leave only tokens that memory forbids"):
        generate(model, inputs, n=8, memory="free", **options)


@pytest.mark.parametrize("min_words", [None, 0, 1, 6])
def test_words_between_memories_and_a_loop_is_told_of(min_words):
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)], min_words=min_words)
    loving(model, 50.0)
    with pytest.warns(keepsight.KeepsightWarning, match="loop was cut.*max_invocations"):
        out = generate(model, inputs, n=64, memory=MemoryPolicy("free", max_invocations=3))
    found = out.invocations[0]
    assert len(found) == 3
    between = [b.position - (a.position + len(a.latents) + 2) for a, b in itertools.pairwise(found)]
    wanted = [len(a.latents) for a in found[:-1]] if min_words is None else [min_words] * 2
    assert between == wanted
    # The policy's own word counts; where the model does not decide there is nothing to guard.
    with pytest.warns(keepsight.KeepsightWarning):
        out = generate(model, inputs, n=64, memory=MemoryPolicy("free", max_invocations=2, min_words=9))
    a, b = out.invocations[0]
    assert b.position - (a.position + len(a.latents) + 2) == 9
    with pytest.raises(keepsight.KeepsightError, match="no effect"):
        MemoryPolicy("random", min_words=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = generate(model, inputs, n=40, memory=forced([{0: "short", 1: "long"}]))
    assert len(out.invocations[0]) == 2


@pytest.mark.parametrize(
    "setting",
    [
        {"max_invocations": -1},
        {"max_invocations": 2.5},
        {"max_invocations": True},
        {"min_words": "3"},
        {"name": "random", "probability": "x"},
        *({"name": "forced", "at": at} for at in ("short", {"0": "short"}, {0.5: "long"}, [{0: "short"}, None])),
    ],
    ids=repr,
)
def test_a_policy_of_the_wrong_kind_is_refused_when_it_is_written(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{list(setting)[-1]}=.*: expected"):
        MemoryPolicy(**setting)


@loops
@pytest.mark.parametrize("tiny", FAMILIES, ids=lambda f: f.name)
def test_an_answer_with_memories_is_the_next_turns_prompt(tiny):
    """Cached, uncached, with and without further memories: the latents of earlier turns are where they were."""
    rows = [Row(3, (1, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2)]
    model, inputs = built(tiny.name, rows)
    first = generate(model, inputs, n=24, memory=forced([{2: "short"}, {1: "long", 3: "short"}]))
    words = torch.randint(5, 115, (2, 3))
    new = torch.cat([first.sequences[:, inputs["input_ids"].shape[1] :], words], 1)
    turn = with_continuation(inputs, new)
    with torch.no_grad(), splice(model, turn["input_ids"], first.invocations):
        expected = model(**turn).logits[:, -1]
    plan = forced([{1: "long"}, {}])
    for memory in (plan, "off", "free"):
        second = generate(model, turn, n=12, memory=memory, invocations=first.invocations)
        torch.testing.assert_close(second.logits[0], expected, **CLOSE)
        earlier = [[i.latents for i in row] for row in first.invocations]
        assert all(
            a[: len(b)] and all(map(torch.equal, [i.latents for i in a], b))
            for a, b in zip(second.invocations, earlier, strict=True)
        )
        for row, found in zip(second.sequences, second.invocations, strict=True):
            assert [i.position for i in found] == [
                p for p, token in enumerate(row.tolist()) if VisMemBranch.of(model).tokens.invoked(token)
            ]
        if memory == "off":
            assert [len(row) for row in second.invocations] == [1, 2]
    second = generate(model, turn, n=12, memory=plan, invocations=first.invocations)
    cached = torch.stack(second.logits, 1)
    torch.testing.assert_close(at_choices(second, cached), at_choices(second, uncached(model, turn, second)), **CLOSE)


@loops
@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl_qwen3", "smolvlm"])
@pytest.mark.parametrize("first", [Row(3, (1, 2), 4, seed=1), Row(5, seed=4)], ids=["an image", "words"])
def test_an_image_in_a_later_turn(name, first):
    """Cached equals uncached where every turn brings images, and where the first one brings none."""
    tiny = BY_NAME[name]
    base = tiny.build()
    turns = [make_inputs(tiny, base, [row]) for row in (first, Row(2, (2, 2), 3, seed=2), Row(1, (1, 2), 1, (2, 2), 2))]
    model = attach(base)
    inputs, out = turns[0], None
    for more in turns:
        if out is not None:
            written = with_continuation(inputs, out.sequences[:, inputs["input_ids"].shape[1] :])
            along = {
                key: 1 if tiny.by_row or value.shape == more["input_ids"].shape else 0 for key, value in more.items()
            }
            both = {key: [one[key] for one in (written, more) if key in one] for key in written | more}
            inputs = {key: torch.cat(parts, along.get(key, 1)) for key, parts in both.items()}
        plan = forced([{0: "short", 5: "long"} if "pixel_values" in inputs else {1: "long"}])
        out = generate(model, inputs, n=26, memory=plan, invocations=None if out is None else out.invocations)
        found = torch.stack(out.logits, 1)
        torch.testing.assert_close(at_choices(out, found), at_choices(out, uncached(model, inputs, out)), **CLOSE)
    assert [one.kind for one in out.invocations[0]][-4:] == ["short", "long"] * 2


def test_latents_are_never_lost_without_a_word():
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    out = generate(model, inputs, memory=forced([{2: "long"}]))
    turn = with_continuation(inputs, out.sequences[:, inputs["input_ids"].shape[1] :])
    for memory in ("free", "off", forced([{}])):
        with pytest.raises(keepsight.KeepsightError, match=r"invocations=out\.invocations"):
            generate(model, turn, memory=memory)
    with pytest.raises(keepsight.KeepsightError, match="splice"):
        model(**turn)
    with model.disable_adapter(), pytest.raises(keepsight.KeepsightError, match="no VisMem adapter is active"):
        generate(model, turn)
    with pytest.raises(keepsight.KeepsightError, match="hold no memory"):
        generate(model, inputs, invocations=out.invocations)
    with pytest.raises(keepsight.KeepsightError, match="0 invocations bring 0"):
        generate(model, turn, invocations=[[]])
    with pytest.raises(keepsight.KeepsightError, match="took them"), splice(model, out.sequences, out.invocations):
        model(**inputs)


@pytest.mark.parametrize("graphs", [{}, {"fullgraph": True}], ids=["in graphs", "in one graph"])
def test_latents_are_never_lost_in_a_compiled_forward(graphs):
    model, inputs = built("internvl_qwen3", [Row(1, (2, 2), 5, seed=2)])
    out = generate(model, inputs, memory=forced([{2: "long"}]))
    text = out.sequences[:, inputs["input_ids"].shape[1] :]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", **graphs)
    with torch.no_grad():
        for call in (model, compiled):
            with pytest.raises(keepsight.KeepsightError, match="splice"):
                call(input_ids=text)
        with splice(model, text, out):
            expected = model(input_ids=text).logits
        with splice(model, text, out):
            torch.testing.assert_close(compiled(input_ids=text).logits, expected, **CLOSE)


def test_invocations_are_an_outputs_or_the_output():
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    out = generate(model, inputs, memory=forced([{2: "long"}]))
    turn = with_continuation(inputs, out.sequences[:, inputs["input_ids"].shape[1] :])
    found = [generate(model, turn, memory="off", invocations=given).sequences for given in (out, out.invocations)]
    assert torch.equal(*found)
    for wrong in (out.invocations[0], out.sequences, dict(enumerate(out.invocations)), [out], "free", [[1]]):
        with pytest.raises(keepsight.KeepsightError, match=r"invocations: found .*expected is, for each row.*out\.inv"):
            generate(model, turn, invocations=wrong)
        if not torch.is_tensor(wrong):
            with pytest.raises(keepsight.KeepsightError, match="invocations: found"):
                splice(model, turn["input_ids"], wrong)


def test_reversed_writes_the_token_of_what_it_forms():
    model, inputs = built("qwen2_5_vl", [Row(1, (2, 2), 5, seed=2)])
    loving(model, 50.0)
    with pytest.warns(keepsight.KeepsightWarning, match="loop"):
        out = generate(model, inputs, memory=MemoryPolicy("reversed", max_invocations=1))
    (found,) = out.invocations[0]
    assert found.kind != found.invoked_as
    tokens = VisMemBranch.of(model).tokens
    pair = out.sequences[0, found.position].item(), out.sequences[0, found.position + 1].item()
    assert pair == (tokens.invoke[found.kind], tokens.end[found.kind])
    assert not out.sampled[0, found.position - inputs["input_ids"].shape[1]]


@pytest.mark.parametrize("ids", [[], [1, 2]])
def test_unknown_ids_are_a_lesson(ids):
    with pytest.raises(keepsight.KeepsightError, match="add_memory_tokens"):
        keepsight.vismem.tokens.MemoryTokens(ids)
    with pytest.raises(keepsight.KeepsightError, match="add_memory_tokens"):
        keepsight.vismem.decode(None, torch.zeros(1, 3), VisMemConfig())


def test_generation_under_inference_mode_leaves_training_alone():
    family = BY_NAME["qwen2_5_vl"]
    model = attach(family.build(), **SIZES)
    inputs = make_inputs(family, model.get_base_model(), [Row(3, (2, 2), 4, seed=1)])
    with torch.inference_mode():
        generate(model, inputs, memory=forced([{2: "short"}]))
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert VisMemBranch.of(model).active.rows.invoke_bias.grad is not None
