"""What cannot work says so, nothing is served without its memory in silence, and other models notice no plugin."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import words

from keepsight.serve.vllm import check, names
from keepsight.serve.vllm.check import UnsupportedVllmError, check_architecture, check_layer, check_signature


def test_pipeline_parallelism_is_refused(qwen3, serve):
    with pytest.raises(RuntimeError, match=r"[Pp]ipeline parallelism"):
        serve(qwen3.served, [], engine={"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"})


def test_another_version_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(check, "installed_version", lambda: "0.34.0")
    monkeypatch.delitem(sys.modules, "keepsight.serve.vllm.families", raising=False)
    with pytest.raises(UnsupportedVllmError, match=r"vLLM 0\.32\.x and 0\.33\.x, and this is vLLM 0\.34\.0"):
        importlib.import_module("keepsight.serve.vllm.families")


def test_moved_internals_are_refused():
    class Moved:
        def embed_input_ids(self, input_ids, multimodal_embeddings=None):
            """Without `is_multimodal`."""

    with pytest.raises(UnsupportedVllmError, match=r"embed_input_ids takes .* would risk answers without memory"):
        check_architecture(Moved)
    with pytest.raises(UnsupportedVllmError, match="takes"):
        check_signature(lambda weights, strict: None, "weights")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = self.post_attention_layernorm = torch.nn.Identity()

        def forward(self, x):
            return x + self.mlp(self.post_attention_layernorm(x))

    with pytest.raises(UnsupportedVllmError, match=r"does not hold the line"):
        check_layer(Layer(), "Decoder layer 3")
    with pytest.raises(UnsupportedVllmError, match=r"without post_attention_layernorm and mlp"):
        check_layer(torch.nn.Identity(), "Decoder layer 3")


def test_an_export_without_its_memory_is_refused(qwen3, tmp_path, serve):
    broken = tmp_path / "broken"
    shutil.copytree(qwen3.served, broken)
    (broken / names.MEMORY_FILE).unlink()
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != names.MEMORY_FILE}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RuntimeError, match=r"tensors of the visual memory were not among the weights"):
        serve(str(broken), [])


def test_without_the_plugin_an_export_is_refused(qwen3, serve):
    with pytest.raises(RuntimeError, match=r"KeepsightQwen3VLForConditionalGeneration.*not supported"):
        serve(qwen3.served, [], environment={"VLLM_PLUGINS": "none"})


def test_other_models_do_not_notice_the_plugin(qwen3, serve):
    """The plain base, served with the plugin installed, even one that does not fit this vLLM."""
    nine = qwen3.nine()
    (answers,) = serve(str(qwen3.folder / "base"), [nine])["rounds"]
    for request, answer in zip(nine, answers, strict=True):
        assert answer["tokens"] == qwen3.answer(request, memory=False)["tokens"]
    code = (
        "import keepsight.serve.vllm.check as c; c.installed_version = lambda: '0.99.0'\n"
        "from keepsight.serve.vllm.plugin import register; register()\n"
        "from vllm import ModelRegistry\n"
        "print('Qwen3VLForConditionalGeneration' in ModelRegistry.get_supported_archs())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("True")
    assert "all others are unaffected" in done.stdout + done.stderr


def test_a_typed_placeholder_is_no_image(qwen3, serve):
    """Ids of placeholder tokens without an image behind them stay text."""
    request = qwen3.request(f"{words(1, 4)} @ {words(2, 6)}", qwen3.image("a", 24, 32))
    typed = {"text": f"{words(3, 4)} <|video_pad|> {words(4, 5)}", "images": []}
    (answers,) = serve(qwen3.served, [[typed, request]])["rounds"]
    assert answers[0]["tokens"] == qwen3.answer(typed)["tokens"] == qwen3.answer(typed, memory=False)["tokens"]
    assert answers[1]["tokens"] == qwen3.answer(request)["tokens"]
