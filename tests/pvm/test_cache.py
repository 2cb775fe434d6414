"""Whatever way tokens are generated, the result is that of one uncached forward of one row."""

import copy
import pickle
import threading

import pytest
import torch
from families import BY_NAME, END, IMAGE, START, VIDEO, Row, make_inputs
from families.tiny import device
from helpers import (
    CLOSE,
    MIXED_ROWS,
    attach,
    built,
    cached_and_uncached,
    counted,
    generate,
    logits,
    with_continuation,
)
from transformers import CompileConfig, DynamicCache, StaticCache

from keepsight.backbone import Backbone
from keepsight.compat import cache_argument, find_output_cache
from keepsight.errors import KeepsightError
from keepsight.pvm.cache import VisualCache
from keepsight.pvm.module import PvmBlock


def test_cached_equals_uncached(family):
    model, inputs = built(family)
    out = generate(model, inputs)
    torch.testing.assert_close(*cached_and_uncached(model, inputs, out), **CLOSE)


def test_published_rule_cached_equals_uncached(family):
    model, inputs = built(family, causal=False)
    out = generate(model, inputs)
    torch.testing.assert_close(*cached_and_uncached(model, inputs, out), **CLOSE)


def test_batch_equals_its_rows(family):
    family.skip_rows_beside_others()
    model, inputs = built(family)
    together = logits(model, inputs)
    for i, row in enumerate(MIXED_ROWS):
        alone = logits(model, make_inputs(family, model, [row]))[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, **CLOSE)


def test_generated_batch_equals_its_rows(family):
    family.skip_rows_beside_others()
    model, inputs = built(family)
    together = generate(model, inputs).sequences[:, -6:]
    for i, row in enumerate(MIXED_ROWS):
        alone = generate(model, make_inputs(family, model, [row])).sequences[0, -6:]
        assert together[i].tolist() == alone.tolist()


def test_images_are_projected_once(family):
    model, inputs = built(family)
    with counted(PvmBlock, "project") as calls:
        generate(model, inputs, n=5)
    assert calls[0] == 2  # two blocks, one prefill; no decoding step projects again


def test_static_cache_equals_dynamic(family):
    family.skip_lacking("static cache")
    model, inputs = built(family)
    dynamic = generate(model, inputs)
    static = generate(model, inputs, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), **CLOSE)


def test_generate_compiles_by_itself():
    """With a static cache, as on a GPU unasked; a CPU is asked to, and spared the compiler behind the graph."""
    model, inputs = built(BY_NAME["qwen3_vl"])
    eager = generate(model, inputs)
    wanted = CompileConfig() if torch.device(device).type == "cuda" else CompileConfig(mode=None, backend="aot_eager")
    wanted._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        found = generate(model, inputs, cache_implementation="static", compile_config=wanted)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert torch.equal(found.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(eager.logits), **CLOSE)


def test_a_static_cache_serves_a_second_request(family):
    if family.hybrid:
        pytest.skip("transformers keeps no static cache with reset for linear attention")
    family.skip_lacking("static cache")
    model, _ = built(family)
    rows = [[Row((2, 2), 4, seed=11)], [Row(2, (2, 2), 5, seed=12)]]
    first, second = (make_inputs(family, model, r) for r in rows)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=192)
    generate(model, first, **cache_argument(model, cache), disable_compile=True)
    cache.reset()
    again = generate(model, second, **cache_argument(model, cache), disable_compile=True).sequences
    assert again.tolist() == generate(model, second).sequences.tolist()


def expandable_rows(family):
    family.skip_wrong_copies()
    # Where a family repeats its pixels by plain repetition, transformers < 5.20 shuffles the images of rows that have
    # several, and GLM's own way does so still; one image per row is right everywhere.
    return MIXED_ROWS if family.marks and family.several else [Row(3, (1, 2), 4, seed=1), Row(1, (2, 2), 5, seed=2)]


def test_beam_search_equals_uncached_beams(family):
    model, inputs = built(family, expandable_rows(family))
    options = {"num_beams": 3, "num_return_sequences": 2, "output_logits": False, "n": 5}
    cached = generate(model, inputs, **options).sequences
    uncached = generate(model, inputs, use_cache=False, **options).sequences
    assert cached.tolist() == uncached.tolist()


def test_sampling_several_sequences(family):
    """Each of the sampled continuations has the logits of its own uncached forward."""
    family.skip_rows_beside_others()
    rows = expandable_rows(family)
    model, inputs = built(family, rows)
    torch.manual_seed(0)
    out = generate(model, inputs, n=5, do_sample=True, num_return_sequences=3, suppress_tokens=[IMAGE])
    prompt = inputs["input_ids"].shape[1]
    for i, row in enumerate(rows):
        alone = make_inputs(family, model, [row])
        for j in range(3):
            tokens = out.sequences[3 * i + j, prompt:][None]
            whole = logits(model, with_continuation(alone, tokens), use_cache=False)[0, -6:-1]
            torch.testing.assert_close(torch.stack(out.logits, 1)[3 * i + j], whole, **CLOSE)


def test_assisted_decoding_equals_greedy(family):
    model, inputs = built(family, [Row(2, (2, 2), 6, seed=4)])
    plain = generate(model, inputs, n=8).sequences
    try:
        guessed = generate(model, inputs, n=8, prompt_lookup_num_tokens=3).sequences
    except (ValueError, RuntimeError) as error:
        if not family.hybrid:
            raise
        pytest.skip(f"transformers itself refuses assisted decoding here: {error}")
    assert guessed.tolist() == plain.tolist()


def test_continued_conversation_with_a_second_image(family):
    """A second turn on the same cache, with a new image, equals the whole conversation in one uncached forward."""
    family.skip_lacking("turns")
    first, second = Row(2, (2, 2), 4, seed=21), Row(3, (1, 2), 4, seed=22)
    model, inputs = built(family, [first])
    later = make_inputs(family, model, [second])
    if family.name == "paligemma":  # what is read in both directions cannot be continued
        inputs["token_type_ids"], later["token_type_ids"] = (torch.ones_like(i["input_ids"]) for i in (inputs, later))
    with torch.no_grad():
        cache = find_output_cache(model(**inputs, use_cache=True))
        n = inputs["input_ids"].shape[1]
        both = {k: torch.cat([inputs[k], later[k]], _along(family, inputs, k)) for k in inputs}
        turn = {k: v for k, v in later.items() if k not in ("attention_mask", "token_type_ids")}
        # Of the text before, the model wants to know what is no padding, and (Gemma, PaliGemma) what was an image.
        before = ("attention_mask", "token_type_ids", *(["mm_token_type_ids"] if "gemma" in family.name else []))
        turn |= {k: both[k] for k in before if k in both}
        positions = _positions(model, both)
        if positions is not None:
            turn["position_ids"] = positions[..., n:]
        if "batch_num_images" in both:  # two single-image turns, encoded as single images
            both["batch_num_images"] = torch.tensor([1, 1])
        whole = model(**both, use_cache=False).logits[:, n:]
        torch.testing.assert_close(model(**turn, **cache_argument(model, cache)).logits, whole, **CLOSE)


def _along(family, inputs, name):
    """The dimension along which two turns of one row are put together."""
    if name == "pixel_values" and family.pixel_dim:
        return family.pixel_dim
    return int(family.by_row or inputs[name].shape == inputs["input_ids"].shape)


def _positions(model, inputs):
    """Rotary positions of a whole conversation, for families that place images in three dimensions."""
    vlm = Backbone.of(model).vlm
    if not hasattr(vlm, "get_rope_index"):
        return None
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return vlm.get_rope_index(**{k: inputs[k] for k in wanted if k in inputs})[0]


def test_a_cropped_image_is_forgotten():
    """Cropping the cache back to before the second image takes that image out of the memory too."""
    family = BY_NAME["internvl_qwen2"]
    model, inputs = built(family, [Row(2, (2, 2), 3, (2, 2), 3, seed=31)])
    keep = 2 + 4 + 3
    with torch.no_grad():
        cache = find_output_cache(model(**inputs, use_cache=True))
        cache.crop(keep - inputs["input_ids"].shape[1])
        word = torch.tensor([[50]])
        after_crop = model(input_ids=word, **cache_argument(model, cache)).logits
        short = {"input_ids": inputs["input_ids"][:, :keep], "pixel_values": inputs["pixel_values"][:1]}
        fresh = find_output_cache(model(**short, use_cache=True))
        never_seen = model(input_ids=word, **cache_argument(model, fresh)).logits
    torch.testing.assert_close(after_crop, never_seen, **CLOSE)


def qwen_clip(name):
    """A clip of two frames of 1x2 tokens: Qwen3-VL marks every frame in the prompt, Qwen2.5-VL the whole clip."""
    frame = [START, VIDEO, VIDEO, END]
    clip = frame * 2 if name == "qwen3_vl" else [START] + [VIDEO] * 4 + [END]
    ids = torch.tensor([[7, 8, *clip, 20, 21, 22]])
    pixels = torch.randn(16, 3 * 2 * 4 * 4) * 2
    return ids, {
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[2, 2, 4]]),
    }


def llava_clip(name):
    """Two frames, pooled from 3x3 to 2x2 tokens each, and one newline token."""
    ids = torch.tensor([[7, 8] + [VIDEO] * 9 + [20, 21, 22]])
    return ids, {"pixel_values_videos": torch.randn(1, 2, 3, 12, 12) * 2}


@pytest.mark.parametrize(
    ("name", "clip"), [("qwen3_vl", qwen_clip), ("qwen2_5_vl", qwen_clip), ("llava_onevision", llava_clip)]
)
def test_video(name, clip):
    """Video frames are remembered like images: cached equals uncached, and the memory matters."""
    model = BY_NAME[name].build()
    torch.manual_seed(3)
    ids, pixels = clip(name)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    base = logits(model, inputs)
    model = attach(model)
    assert (logits(model, inputs) - base).abs().max() > 1e-3
    out = generate(model, inputs)
    torch.testing.assert_close(*cached_and_uncached(model, inputs, out), **CLOSE)


def test_interleaved_requests_never_see_each_others_image(family):
    """Two requests decoded in turns, step by step, equal each alone."""
    model, _ = built(family)
    requests = [make_inputs(family, model, [Row(2, (2, 2), 4, seed=s)]) for s in (41, 42)]
    alone = [generate(model, r, n=4) for r in requests]
    with torch.no_grad():
        states = [model(**r, use_cache=True) for r in requests]
        for step in range(3):
            for i, request in enumerate(requests):
                n = request["input_ids"].shape[1]
                token = alone[i].sequences[:, n + step][:, None]
                extra = {}
                positions = _positions_of_step(model, request, step)
                if positions is not None:
                    extra["position_ids"] = positions
                extra |= cache_argument(model, find_output_cache(states[i]))
                states[i] = model(input_ids=token, use_cache=True, **extra)
                torch.testing.assert_close(states[i].logits[:, -1], alone[i].logits[step + 1], **CLOSE)


def _positions_of_step(model, request, step):
    # Qwen models keep their rope offset on the model, so interleaved steps must bring their positions themselves.
    vlm = Backbone.of(model).vlm
    if not hasattr(vlm, "get_rope_index"):
        return None
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    kwargs = {k: request[k] for k in wanted if k in request}
    positions, deltas = vlm.get_rope_index(**kwargs)
    return torch.full_like(positions[..., :1], request["input_ids"].shape[1] + step) + deltas


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl_qwen2", "llava_onevision"])
def test_threads(name):
    """Four threads generating at once, three times each: every answer equals the one given alone."""
    family = BY_NAME[name]
    model, _ = built(family)
    requests = [make_inputs(family, model, [Row(2, (2, 2), 4, seed=50 + i)]) for i in range(4)]
    alone = [generate(model, r).sequences.tolist() for r in requests]
    assert len({str(a) for a in alone}) > 1
    found: list[list] = [[] for _ in requests]

    def work(i: int) -> None:
        for _ in range(3):
            found[i].append(generate(model, requests[i]).sequences.tolist())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answer == alone[i] for i, answers in enumerate(found) for answer in answers)
    assert all(len(answers) == 3 for answers in found)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl_qwen2"])
def test_compiled_decode_equals_eager(name):
    """One decoding step with a static cache compiles as one graph and equals eager."""
    family = BY_NAME[name]
    model, inputs = built(family, [Row((2, 2), 4, seed=61)])
    text, n = model.config.get_text_config(), inputs["input_ids"].shape[1]

    @torch.no_grad()
    def steps(step):
        cache = StaticCache(config=text, max_cache_len=32)
        state = model(**inputs, **cache_argument(model, cache), use_cache=True)
        found = []
        for i in range(3):
            position = torch.tensor([[n + i]])
            state = step(
                input_ids=torch.tensor([[40 + i]]),
                position_ids=position,
                **cache_argument(model, cache),
                use_cache=True,
            )
            found.append(state.logits)
        return torch.cat(found)

    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(steps(compiled), steps(model), **CLOSE)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl_qwen2"])
def test_a_compiled_model_that_reads_images_equals_the_eager_one(name):
    """Images break the graph in two; what a hook noted in one part is there in the next."""
    model, inputs = built(BY_NAME[name], [Row((2, 2), 4, seed=61)])
    base = model.get_base_model()
    forward, eager = base.forward, {}
    torch._dynamo.reset()
    for kind in ("eager", "compiled"):
        base.forward = forward if kind == "eager" else torch.compile(forward, backend="eager")
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= {"loss": loss.detach(), "ids": generate(model, inputs).sequences}
        eager = eager or found
    assert len(found) > 10
    for key, value in found.items():
        torch.testing.assert_close(value, eager[key], rtol=0, atol=1e-5)


def test_layers_that_share_a_compiled_graph_are_an_error_or_right():
    """torch.compile takes one layer's graph for the next, hooks unseen, where nothing else tells them apart."""
    model, inputs = built(BY_NAME["qwen3_vl"], [Row((2, 2), 4, seed=61)])
    base = model.get_base_model()
    eager, forward = model(**inputs, use_cache=False).logits, base.forward
    base.forward = torch.compile(forward, backend="eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, eager, **CLOSE)
    torch._dynamo.reset()
    try:
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, eager, **CLOSE)
    except KeepsightError as error:
        told = str(error)
        assert "skip_nnmodule_hook_guards" in told


def test_memory_lives_and_dies_with_the_cache():
    family = BY_NAME["qwen3_vl"]
    model, inputs = built(family)
    out = generate(model, inputs)
    cache = find_output_cache(out)
    layer = VisualCache.of(cache)
    assert len(cache) == model.config.get_text_config().num_hidden_layers
    assert len(layer.states) == 2
    assert not any(t.requires_grad for states in layer.states.values() for t in states)
    fresh = DynamicCache(config=model.config.get_text_config())
    assert VisualCache.of(fresh) is None
    # Nothing of the request is left on the model: a text-only request gives what the base gives.
    text = make_inputs(family, model, [Row(6, seed=9)])
    with model.disable_adapter():
        base = logits(model, text)
    assert torch.equal(logits(model, text), base)


def _swapped(cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def _selected(cache):
    cache.batch_select_indices(torch.tensor([1, 0]))
    return cache


def _repeated(cache):
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    return cache


CHANGES = {
    "reorder": _swapped,
    "select": _selected,
    "repeat": _repeated,
    "deepcopy": lambda cache: _swapped(copy.deepcopy(cache)),
    "pickle": lambda cache: _swapped(pickle.loads(pickle.dumps(cache))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_happens_to_a_cache_happens_to_its_memory(change):
    """Two rows that change places continue as each other, and the cache is to everybody else what it was."""
    family = BY_NAME["internvl_qwen3"]
    model, inputs = built(family, [Row(2, (2, 2), 4, seed=1), Row(2, (2, 2), 4, seed=2)])
    word = torch.full((2, 1), 50)
    with torch.no_grad():
        cache, plain = DynamicCache(config=model.config.get_text_config()), DynamicCache()
        model(**inputs, **cache_argument(model, cache))
        assert isinstance(cache, type(plain))
        assert len(cache) == len(cache.layers) == model.config.get_text_config().num_hidden_layers
        assert {type(layer) for layer in cache.layers} == {type(layer) for layer in fresh_layers(model)}
        expected = model(input_ids=word, **cache_argument(model, copy.deepcopy(cache))).logits
        changed = CHANGES[change](cache)
        found = model(input_ids=word, **cache_argument(model, changed)).logits
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    torch.testing.assert_close(found, expected.flip(0), **CLOSE)


def fresh_layers(model):
    return DynamicCache(config=model.config.get_text_config()).layers


def test_a_cropped_and_a_given_cache_keep_their_memory():
    family = BY_NAME["internvl_qwen3"]
    model, inputs = built(family, [Row(2, (2, 2), 4, seed=1)])
    plain = generate(model, inputs).sequences
    with torch.no_grad():
        cache = find_output_cache(model(**inputs, use_cache=True))
        word = torch.tensor([[50]])
        first = model(input_ids=word, **cache_argument(model, cache)).logits
        cache.crop(-1)
        torch.testing.assert_close(model(input_ids=word, **cache_argument(model, cache)).logits, first, **CLOSE)
    given = generate(model, inputs, **cache_argument(model, DynamicCache(config=model.config.get_text_config())))
    assert given.sequences.tolist() == plain.tolist()
