"""A memory of the published rule, served all the same: loudly, by the causal rule, and how far off that is.

pytest -s tests_vllm/test_noncausal.py prints the figures of docs/serve-vllm.md.
"""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import Model, assert_equal, words
from tiny import make_memory

from keepsight.errors import KeepsightWarning
from keepsight.serve.vllm.export import ExportError, export_vllm


def test_the_published_rule_is_served_loudly_and_by_the_causal_rule(qwen3, serve, tmp_path):
    published, causal = tmp_path / "published", tmp_path / "causal"
    published.mkdir()
    make_memory(qwen3.folder / "base", published / "memory", causal=False)
    with pytest.raises(ExportError, match="non-causal rule"):
        export_vllm(published / "memory", published / "out")
    with pytest.warns(KeepsightWarning, match="text before an image gets no memory of it"):
        export_vllm(published / "memory", published / "out", allow_noncausal=True)
    shutil.copytree(published / "memory", causal / "memory")  # the same weights under the other rule
    config = json.loads((causal / "memory" / "adapter_config.json").read_text())
    (causal / "memory" / "adapter_config.json").write_text(json.dumps(config | {"causal": True}))
    trained, as_causal = Model("qwen3_vl", published), Model("qwen3_vl", causal)

    images = [qwen3.image(f"n{i}", 16 + 8 * (i % 4), 24 + 8 * (i % 3)) for i in range(12)]
    kinds = {
        "the image first": [qwen3.request(f"@ {words(i, 8)}", image) for i, image in enumerate(images)],
        "10 words first": [qwen3.request(f"{words(40, 10)} @ {words(i, 8)}", image) for i, image in enumerate(images)],
        "90 words first": [qwen3.request(f"{words(40, 90)} @ {words(i, 8)}", image) for i, image in enumerate(images)],
    }
    out = serve(str(published / "out"), list(kinds.values()))

    assert "was trained with the published, non-causal rule and is served by the causal one" in out["log"]
    assert "WARNING" in next(line for line in out["log"].splitlines() if "non-causal" in line)
    off: dict[str, list[float]] = {}
    same: dict[str, int] = {}
    for (kind, requests), answers in zip(kinds.items(), out["rounds"], strict=True):
        assert_equal(as_causal, requests, answers)  # so the rule is all that differs
        off[kind], same[kind] = [], 0
        for request, answer in zip(requests, answers, strict=True):
            expected = trained.answer(request)
            for step, (token, value) in enumerate(zip(answer["tokens"], answer["logprobs"], strict=True)):
                off[kind].append(abs(value - expected["all"][step, token].item()))
                if token != expected["tokens"][step]:
                    break
                same[kind] += 1
        off[kind].sort()
        total = sum(len(answer["tokens"]) for answer in answers)
        print(
            f"{kind}: {same[kind]} of {total} greedy tokens before the first that differs; |log p| off by "
            f"{off[kind][len(off[kind]) // 2]:.3f} (median), {off[kind][-1]:.3f} (most)"
        )
    assert min(off["90 words first"][-1], off["10 words first"][-1]) > 0.01, "the two rules differ there"
    assert same["the image first"] >= max(same["10 words first"], same["90 words first"])
