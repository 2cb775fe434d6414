"""vLLM with a memory writes what the Hugging Face path writes, whatever vLLM does on the way."""

from __future__ import annotations

import pytest
from conftest import ALLOWED, Model, assert_equal, words
from tiny import make_lora, make_memory

from keepsight.serve.vllm.check import installed_version
from keepsight.serve.vllm.export import export_vllm

CHUNKED = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "enable_prefix_caching": True}


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_nine_prompts_in_chunks_of_48_with_the_prefix_cache(family, make_model, serve):
    model = make_model(family)
    nine = model.nine()
    a, b = model.image("a", 24, 32), model.image("b", 32, 24)
    # one after the other, so that each finds what the earlier ones left in the prefix cache
    same_text = [[model.request(f"{words(20, 70)} @ {words(30, 40)}", image)] for image in (a, b, a)]
    same_image = [[model.request(f"{words(start, 40)} @ {words(31, 40)}", a)] for start in (21, 22, 21)]
    rounds = [nine, nine, nine, *same_text, *same_image]

    out = serve(model.served, rounds, engine=CHUNKED)

    for requests, answers in zip(rounds, out["rounds"], strict=True):
        assert_equal(model, requests, answers)
    assert not any(answer["cached"] for answer in out["rounds"][0])
    assert sum(answer["cached"] > 0 for answer in out["rounds"][1]) >= 6
    (first,), (other,), (again,) = out["rounds"][3:6]
    assert first["tokens"] != other["tokens"]
    assert 0 < other["cached"] < 70 < again["cached"]  # text before the image is shared, what follows another is not
    assert out["rounds"][6][0]["tokens"] != out["rounds"][7][0]["tokens"]

    # the test can fail: without its memory, the model answers differently wherever there is an image
    without = [model.answer(request, memory=False)["tokens"] for request in nine]
    changed = [answer["tokens"] != tokens for answer, tokens in zip(out["rounds"][0], without, strict=True)]
    assert changed == [bool(request["images"]) for request in nine]


def test_without_the_flag_channel_the_answers_are_wrong(qwen3, serve):
    nine = qwen3.nine()
    (answers,) = serve(qwen3.served, [nine], mutation="no flag", engine=CHUNKED)["rounds"]
    equal = [answer["tokens"] == qwen3.answer(request)["tokens"] for request, answer in zip(nine, answers, strict=True)]
    assert equal[7], "text alone has no memory to get wrong"
    assert sum(equal) <= 3


@pytest.mark.parametrize("cache", [True, False])
def test_preempted_requests_lose_nothing(qwen3, serve, cache):
    requests = [
        qwen3.request(f"{words(i, 20)} @ {words(i + 1, 25)}", qwen3.image(f"p{i}", 24, 16 + 8 * (i % 3)))
        for i in range(14)
    ]
    engine = {"num_gpu_blocks_override": 24, "enable_prefix_caching": cache, "max_num_batched_tokens": 256}
    engine["max_model_len"] = 512
    out = serve(qwen3.served, [requests], engine=engine, length=40)
    assert out["metrics"]["vllm:num_preemptions"] > 0
    assert_equal(qwen3, requests, out["rounds"][0])


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_other_families(family, make_model, serve):
    model = make_model(family)
    nine = model.nine()
    out = serve(model.served, [nine, nine])
    for answers in out["rounds"]:
        assert_equal(model, nine, answers)
    without = [model.answer(request, memory=False)["tokens"] for request in nine]
    assert sum(a["tokens"] != t for a, t in zip(out["rounds"][0], without, strict=True)) >= 6


def test_qwen3_5_to_within_the_rounding_of_bfloat16(make_model, serve):
    """vLLM's CPU kernel of linear attention knows bfloat16 only, so a tie may break either way, and no more."""
    model = make_model("qwen3_5")
    nine = model.nine()
    (answers,) = serve(model.served, [nine], engine={"dtype": "bfloat16"})["rounds"]
    rounding, memory = [], []
    for request, answer in zip(nine, answers, strict=True):
        expected, without = model.answer(request), model.answer(request, memory=False)
        assert answer["prompt"] == expected["prompt"]
        for step, (token, logprob) in enumerate(zip(answer["tokens"], answer["logprobs"], strict=True)):
            rounding.append(abs(logprob - expected["all"][step, token].item()))
            if token != expected["tokens"][step]:  # from a tie on, the two write different texts
                assert expected["logprobs"][step] - expected["all"][step, token].item() < 0.15
                break
        if request["images"]:
            memory.append((expected["all"][0] - without["all"][0])[ALLOWED].abs().max().item())
    assert max(rounding) < 0.15
    assert min(memory) > 3 * max(rounding)


def test_what_is_not_an_option_of_keepsight_is_refused(qwen3, serve):
    with pytest.raises(RuntimeError, match="expected nothing, or"):
        serve(qwen3.served, [], engine={"additional_config": {"keepsight": {"overlaps": True}}})


def test_heads_too_wide_for_the_flag_channel(qwen3, serve, tmp_path):
    """Heads of 256, as Qwen3.5's: no kernel has wider ones, so the twin heads serve, here a Qwen3-VL."""
    folder = tmp_path / "wide"
    folder.mkdir()
    make_memory(qwen3.folder / "base", folder / "memory", width=512, head_dim=256)
    export_vllm(folder / "memory", folder / "out")
    wide = Model("qwen3_vl", folder)
    nine = wide.nine()
    out = serve(wide.served, [nine, nine], engine=CHUNKED)
    for answers in out["rounds"]:
        assert_equal(wide, nine, answers)


@pytest.mark.parametrize("overlap", [False, True])
def test_compiled(qwen3, serve, overlap):
    """Also with network and memory as one operator, which on a GPU runs them side by side."""
    nine = qwen3.nine()
    engine = CHUNKED | {"enforce_eager": False, "additional_config": {"keepsight": {"overlap": overlap}}}
    out = serve(qwen3.served, [nine, nine], engine=engine)
    for answers in out["rounds"]:
        assert_equal(qwen3, nine, answers)
    assert out["operators"] == overlap


def test_speculative_decoding(qwen3, serve):
    nine = qwen3.nine()
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    out = serve(qwen3.served, [nine], engine={"speculative_config": ngram}, length=40)
    assert_equal(qwen3, nine, out["rounds"][0])
    assert out["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


def test_several_loras_beside_the_memory(qwen3, serve):
    """Mixed with requests without one, but for vLLM 0.32, whose CPU build is wrong there by itself, memory or not."""
    loras = {name: str(make_lora(qwen3.folder / "base", qwen3.folder / name)) for name in ("one", "other")}
    nine = qwen3.nine()
    old = str(installed_version()).startswith("0.32.")
    names = [("one", "other", "one" if old else None)[i % 3] for i in range(9)]
    mixed = [request | ({"lora": name} if name else {}) for request, name in zip(nine, names, strict=True)]
    engine = CHUNKED | {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    without, with_loras = serve(qwen3.served, [nine, mixed], engine=engine, loras=loras)["rounds"]
    assert_equal(qwen3, nine, without)
    for request, name, answer, plain in zip(nine, names, with_loras, without, strict=True):
        assert_equal(qwen3, [request], [answer], lora=name)
        assert (answer["tokens"] != plain["tokens"]) == (name is not None)


def test_tensor_parallel(qwen3, serve):
    nine = qwen3.nine()
    engine = CHUNKED | {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    out = serve(qwen3.served, [nine, nine], engine=engine)
    for answers in out["rounds"]:
        assert_equal(qwen3, nine, answers)
